// Package chat renders conversations to prompts with the chat template of a Hugging Face model folder, the Jinja
// template that transformers and vLLM run. Nothing of any model's prompt format is written here.
//
// It is not a tokenizer, and it does not expand image placeholders: a template writes one placeholder for each picture,
// and whoever knows the picture's patch grid repeats it.
//
// Templates run in gonja. Where gonja differs from Jinja2 in ways that chat templates use, this package mends it: white
// space control as with trim_blocks and lstrip_blocks, conditional expressions inside parentheses, dictionaries that keep
// their order, tojson, str.strip, str.split, negative indices, range. What is still different: None prints as nothing,
// an undefined name counts as None, and "set a, b = ..." is refused by [Parse].
package chat

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nikolalohinski/gonja/v2/config"
	"github.com/nikolalohinski/gonja/v2/exec"
	"github.com/nikolalohinski/gonja/v2/loaders"
)

var (
	// ErrNoTemplate is returned by [Load] when the folder has no chat template.
	ErrNoTemplate = errors.New("the model has no chat template")

	// ErrTemplate is wrapped by the error of [Parse] when the template is not valid, and by that of [Template.Render]
	// when it fails for a reason that is not its own raise_exception.
	ErrTemplate = errors.New("chat template")

	// ErrRaised is wrapped by [Template.Render]'s error when the template called raise_exception: the conversation is
	// not one that the model takes. The error's text is the template's message.
	ErrRaised = errors.New("the chat template refuses the conversation")

	// ErrMessages is wrapped by [Template.Render]'s error when the messages or tools themselves are not valid: tool
	// calls that are not JSON, a part of unknown type, or a picture for a template that takes text only.
	ErrMessages = errors.New("invalid messages")
)

// Template is a parsed chat template. It does not change and is safe for concurrent use.
type Template struct {
	template *exec.Template
	lists    bool // it loops over a message's content
	now      func() time.Time
}

// Message is one turn of a conversation.
type Message struct {
	Role       string
	Content    []Part          // none: the template sees an empty string
	Name       string          // omitted if empty
	ToolCalls  json.RawMessage // OpenAI's tool_calls, a JSON array; nil if there are none
	ToolCallID string          // omitted if empty
}

// Part is a piece of a message's content.
type Part struct {
	Type string // "text" or "image"
	Text string // of a text
}

// Options are what a conversation is rendered with.
type Options struct {
	AddGenerationPrompt bool            // end with the beginning of the assistant's turn
	Tools               json.RawMessage // OpenAI's tools, a JSON array; nil if there are none
	Kwargs              map[string]any  // further variables (chat_template_kwargs), values as encoding/json decodes them
	BOS, EOS            string          // bos_token and eos_token of the tokenizer
	TextOnlyAsString    bool            // give text-only content as a string even if the template loops over content
}

// Load reads the chat template of a Hugging Face model folder: chat_template.jinja, else chat_template.json, else
// tokenizer_config.json, where a list of templates has one called "default". It returns [ErrNoTemplate] if there is none.
func Load(dir string) (*Template, error) {
	source, path, err := find(dir)
	if err != nil {
		return nil, fmt.Errorf("loading chat template: %w", err)
	}
	t, err := Parse(source)
	if err != nil {
		return nil, fmt.Errorf("loading %s: %w", path, err)
	}
	return t, nil
}

// find returns the source of a folder's template and the file it stands in.
func find(dir string) (source, path string, err error) {
	path = filepath.Join(dir, "chat_template.jinja")
	data, err := os.ReadFile(path)
	if err == nil {
		return string(data), path, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", "", err
	}
	for _, name := range []string{"chat_template.json", "tokenizer_config.json"} {
		path = filepath.Join(dir, name)
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", "", err
		}
		source, err := fromJSON(data)
		if errors.Is(err, ErrNoTemplate) {
			continue
		}
		if err != nil {
			return "", "", fmt.Errorf("%s: %w", path, err)
		}
		return source, path, nil
	}
	return "", "", fmt.Errorf("%w: %s", ErrNoTemplate, dir)
}

// fromJSON returns the chat_template of a JSON file, which is a string or a list of named templates.
func fromJSON(data []byte) (string, error) {
	var file struct {
		Template json.RawMessage `json:"chat_template"`
	}
	if err := json.Unmarshal(data, &file); err != nil {
		return "", err
	}
	if len(file.Template) == 0 || string(file.Template) == "null" {
		return "", ErrNoTemplate
	}
	var source string
	if json.Unmarshal(file.Template, &source) == nil {
		return source, nil
	}
	var named []struct {
		Name     string `json:"name"`
		Template string `json:"template"`
	}
	if err := json.Unmarshal(file.Template, &named); err != nil {
		return "", fmt.Errorf("chat_template is neither a string nor a list: %w", err)
	}
	for _, n := range named {
		if n.Name == "default" {
			return n.Template, nil
		}
	}
	return "", fmt.Errorf("%w called default", ErrNoTemplate)
}

// Parse parses the source of a chat template.
func Parse(source string) (t *Template, err error) {
	defer recovered(&err)
	source, err = translate(source)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTemplate, err)
	}
	const name = "/chat_template"
	loader, err := loaders.NewMemoryLoader(map[string]string{name: source}) // no include reaches the disk
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTemplate, err)
	}
	settings := config.New()
	settings.KeepTrailingNewline = true // translate has removed the one that Jinja removes
	parsed, err := exec.NewTemplate(name, settings, loader, newEnvironment())
	if err != nil {
		// gonja puts the whole template before what is wrong with it.
		return nil, fmt.Errorf("%w: %s", ErrTemplate, strings.TrimPrefix(err.Error(), "failed to parse template '"+source+"': "))
	}
	t = &Template{template: parsed, now: time.Now}
	t.lists = t.takesLists()
	return t, nil
}

// takesLists says whether the template loops over a message's content, by trying: one that does writes the text of a
// part, one that does not fails or writes the list itself. vLLM decides its content format ("auto") by looking for the
// loop in the syntax tree, which misses loops behind macros.
func (t *Template) takesLists() bool {
	const probe = "probe-of-the-content-format"
	message := object("role", "user", "content", list{object("type", "text", "text", probe)})
	out, err := t.execute(list{message}, Options{AddGenerationPrompt: true}, nil)
	return err == nil && strings.Contains(out, probe) && !strings.Contains(out, "'"+probe+"'")
}

// Render returns the prompt for messages. Errors wrap [ErrRaised], [ErrMessages] or [ErrTemplate].
//
// Content that is text only becomes a string for a template that expects strings (parts joined by line breaks, as in
// vLLM), else a list of parts. Content with a picture is always a list.
func (t *Template) Render(messages []Message, opts Options) (string, error) {
	values := make(list, len(messages))
	for i := range messages {
		v, err := t.message(&messages[i], opts.TextOnlyAsString || !t.lists)
		if err != nil {
			return "", fmt.Errorf("%w: messages[%d]: %w", ErrMessages, i, err)
		}
		values[i] = v
	}
	var tools any
	if opts.Tools != nil {
		v, err := decode(opts.Tools)
		if err != nil {
			return "", fmt.Errorf("%w: tools: %w", ErrMessages, err)
		}
		tools = v
	}
	return t.execute(values, opts, tools)
}

// execute runs the template.
func (t *Template) execute(messages list, opts Options, tools any) (out string, err error) {
	defer recovered(&err)
	variables := make(map[string]any, len(opts.Kwargs)+8)
	for name, v := range opts.Kwargs {
		variables[name] = convert(v)
	}
	variables["messages"] = messages
	variables["tools"] = tools
	variables["documents"] = nil
	variables["add_generation_prompt"] = opts.AddGenerationPrompt
	variables["bos_token"] = opts.BOS
	variables["eos_token"] = opts.EOS
	variables["strftime_now"] = func(format string) string { return strftime(t.now(), format) }
	// gonja flattens errors into text on their way up, so the one that matters is kept here.
	var raised error
	variables["raise_exception"] = func(message string) (string, error) {
		raised = fmt.Errorf("%w: %s", ErrRaised, message)
		return "", raised
	}
	var b bytes.Buffer
	err = t.template.Execute(&b, exec.NewContext(variables))
	switch {
	case raised != nil:
		return "", raised
	case err != nil:
		return "", fmt.Errorf("%w: %w", ErrTemplate, err)
	}
	return b.String(), nil
}

// recovered turns a panic of the template library into an error.
func recovered(err *error) {
	if r := recover(); r != nil {
		*err = fmt.Errorf("%w: panic: %v", ErrTemplate, r)
	}
}

// message returns m as the template sees it. Keys stand in the order of transformers' and vLLM's messages.
func (t *Template) message(m *Message, asString bool) (*exec.Dict, error) {
	content, err := t.content(m.Content, asString)
	if err != nil {
		return nil, err
	}
	d := object("role", m.Role, "content", content)
	if m.Name != "" {
		set(d, "name", m.Name)
	}
	if m.ToolCallID != "" {
		set(d, "tool_call_id", m.ToolCallID)
	}
	if m.ToolCalls != nil {
		calls, err := toolCalls(m.ToolCalls)
		if err != nil {
			return nil, fmt.Errorf("tool_calls: %w", err)
		}
		set(d, "tool_calls", calls)
	}
	return d, nil
}

// content returns the parts of a message as a string or a list. A message without any text has an empty string, never a
// list of empty texts: templates ask whether there is content before tool calls.
func (t *Template) content(parts []Part, asString bool) (any, error) {
	values := make(list, len(parts))
	texts := make([]string, len(parts))
	pictures, empty := false, true
	for i, p := range parts {
		switch p.Type {
		case "text":
			texts[i] = p.Text
			empty = empty && p.Text == ""
			values[i] = object("type", "text", "text", p.Text)
		case "image":
			pictures = true
			values[i] = object("type", "image")
		default:
			return nil, fmt.Errorf("content[%d]: unknown type %q", i, p.Type)
		}
	}
	switch {
	case pictures && !t.lists:
		return nil, errors.New("the model's chat template takes no images")
	case pictures, !asString && !empty:
		return values, nil
	}
	return strings.Join(texts, "\n"), nil
}

// toolCalls decodes an array of tool calls. As in vLLM, arguments, which OpenAI's API carries as a string of JSON, are
// decoded too: templates write them with tojson.
func toolCalls(data json.RawMessage) (any, error) {
	v, err := decode(data)
	if err != nil {
		return nil, err
	}
	calls, ok := v.(list)
	if !ok && v != nil {
		return nil, errors.New("not an array")
	}
	for _, c := range calls {
		function, ok := get(c, "function").(*exec.Dict)
		if !ok {
			continue
		}
		switch text, ok := get(function, "arguments").(string); {
		case !ok:
		case strings.TrimSpace(text) == "":
			set(function, "arguments", object())
		default:
			arguments, err := decode([]byte(text))
			if err != nil {
				return nil, fmt.Errorf("function.arguments: %w", err)
			}
			set(function, "arguments", arguments)
		}
	}
	return v, nil
}
