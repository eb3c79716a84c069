package chat

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// wireMessage is a message as OpenAI's API and the golden files write it.
type wireMessage struct {
	Role       string          `json:"role"`
	Content    json.RawMessage `json:"content"`
	ToolCalls  json.RawMessage `json:"tool_calls"`
	ToolCallID string          `json:"tool_call_id"`
}

// messages decodes messages of either content form.
func messages(t testing.TB, wire []wireMessage) []Message {
	t.Helper()
	out := make([]Message, len(wire))
	for i, w := range wire {
		m := Message{Role: w.Role, ToolCalls: w.ToolCalls, ToolCallID: w.ToolCallID}
		var text string
		if json.Unmarshal(w.Content, &text) == nil {
			m.Content = []Part{{Type: "text", Text: text}}
		} else if err := json.Unmarshal(w.Content, &m.Content); err != nil {
			t.Fatal(err)
		}
		out[i] = m
	}
	return out
}

func parse(t testing.TB, source string) *Template {
	t.Helper()
	tpl, err := Parse(source)
	if err != nil {
		t.Fatal(err)
	}
	return tpl
}

func text(role, s string) Message {
	return Message{Role: role, Content: []Part{{Type: "text", Text: s}}}
}

// TestGoldenPrompts renders the demo model's conversations; transformers has repeated the image placeholders.
func TestGoldenPrompts(t *testing.T) {
	data, err := os.ReadFile("../testdata/golden/shapes-vl-moe/cases.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		Name     string        `json:"name"`
		Images   []string      `json:"images"`
		Messages []wireMessage `json:"messages"`
		Prompt   *string       `json:"prompt"`
	}
	if err := json.Unmarshal(data, &cases); err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("testdata/shapes.jinja")
	if err != nil {
		t.Fatal(err)
	}
	tpl := parse(t, string(source))
	repeated := regexp.MustCompile(`(<\|image_pad\|>)+`)
	checked := 0
	for _, c := range cases {
		if c.Prompt == nil {
			continue
		}
		checked++
		got, err := tpl.Render(messages(t, c.Messages), Options{AddGenerationPrompt: true})
		if err != nil {
			t.Fatalf("%s: %v", c.Name, err)
		}
		if want := repeated.ReplaceAllString(*c.Prompt, "<|image_pad|>"); got != want {
			t.Errorf("%s: got %q, want %q", c.Name, got, want)
		}
		if n := strings.Count(got, "<|image_pad|>"); n != len(c.Images) {
			t.Errorf("%s: %d placeholders for %d images", c.Name, n, len(c.Images))
		}
	}
	if checked < 20 {
		t.Errorf("only %d prompts in cases.json", checked)
	}
}

// qwen3 returns the template of the real Qwen3, or skips: its tokenizer's folder is not part of the repository.
func qwen3(t testing.TB) *Template {
	t.Helper()
	dir := os.Getenv("TRIREME_QWEN3_TOKENIZER")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "shared", "tokenizers", "qwen3")
	}
	tpl, err := Load(dir)
	if errors.Is(err, ErrNoTemplate) {
		t.Skipf("SKIPPED: no Qwen3 tokenizer_config.json in %s (set TRIREME_QWEN3_TOKENIZER to its folder)", dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	return tpl
}

func TestQwen3(t *testing.T) {
	tpl := qwen3(t)
	if tpl.lists {
		t.Error("Qwen3's template was taken for one that loops over content")
	}
	data, err := os.ReadFile("testdata/qwen3.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		Messages []wireMessage   `json:"messages"`
		Tools    json.RawMessage `json:"tools"`
		Kwargs   map[string]any  `json:"kwargs"`
		Prompt   string          `json:"prompt"`
	}
	if err := json.Unmarshal(data, &cases); err != nil {
		t.Fatal(err)
	}
	for i, c := range cases {
		opts := Options{AddGenerationPrompt: c.Kwargs["add_generation_prompt"] != false, Kwargs: c.Kwargs, Tools: c.Tools}
		got, err := tpl.Render(messages(t, c.Messages), opts)
		if err != nil {
			t.Errorf("case %d: %v", i, err)
		} else if got != c.Prompt {
			t.Errorf("case %d:\n got %q\nwant %q", i, got, c.Prompt)
		}
	}
}

const (
	// listsOnly loops over content; stringsOnly needs strings; viaMacro loops behind a macro.
	listsOnly   = `{% for m in messages %}{% for p in m['content'] %}{% if p.type == 'image' %}<img>{% else %}[{{ p['text'] }}]{% endif %}{% endfor %}{% endfor %}`
	stringsOnly = `{% for m in messages %}{{ m.role + ': ' + m.content.strip() }}{% endfor %}`
	joined      = `{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}`
	viaMacro    = `{% macro show(c) %}{% if c is string %}S{{ c }}{% else %}{% for p in c %}{{ '<img>' if p.type == 'image' else '[' + p.text + ']' }}{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}`
)

func TestContentFormat(t *testing.T) {
	one := []Message{text("user", "hi")}
	two := []Message{{Role: "user", Content: []Part{{Type: "text", Text: "a"}, {Type: "text", Text: "b"}}}}
	picture := []Message{{Role: "user", Content: []Part{{Type: "image"}, {Type: "text", Text: "b"}}}}
	for _, c := range []struct {
		name, source string
		messages     []Message
		opts         Options
		want         string
	}{
		{"lists", listsOnly, one, Options{}, "[hi]"},
		{"lists, two parts", listsOnly, two, Options{}, "[a][b]"},
		{"lists, picture", listsOnly, picture, Options{}, "<img>[b]"},
		{"strings", stringsOnly, one, Options{}, "user: hi"},
		{"strings, two parts", stringsOnly, two, Options{}, "user: a\nb"},
		{"strings joined", joined, one, Options{}, "user: hi"},
		{"macro", viaMacro, two, Options{}, "[a][b]"},
		{"macro, picture", viaMacro, picture, Options{}, "<img>[b]"},
		{"macro, strings asked for", viaMacro, two, Options{TextOnlyAsString: true}, "Sa\nb"},
		{"macro, strings asked for, picture", viaMacro, picture, Options{TextOnlyAsString: true}, "<img>[b]"},
		{"empty text", viaMacro, []Message{text("assistant", "")}, Options{}, "S"},
		{"nothing", viaMacro, []Message{{Role: "user"}}, Options{}, "S"},
	} {
		got, err := parse(t, c.source).Render(c.messages, c.opts)
		if err != nil || got != c.want {
			t.Errorf("%s: %q, %v; want %q", c.name, got, err, c.want)
		}
	}
}

func TestErrors(t *testing.T) {
	raising := parse(t, `{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools, please') }}{% endif %}{% endfor %}`)
	_, err := raising.Render([]Message{text("tool", "x")}, Options{})
	if !errors.Is(err, ErrRaised) || !strings.Contains(err.Error(), "no tools, please") {
		t.Errorf("raise_exception: %v", err)
	}
	for _, c := range []struct {
		name     string
		messages []Message
		opts     Options
	}{
		{"picture for strings", []Message{{Role: "user", Content: []Part{{Type: "image"}}}}, Options{}},
		{"unknown part", []Message{{Role: "user", Content: []Part{{Type: "audio"}}}}, Options{}},
		{"tool calls", []Message{{Role: "assistant", ToolCalls: json.RawMessage(`[{"function":{"arguments":"{"}}]`)}}, Options{}},
		{"tool calls, no array", []Message{{Role: "assistant", ToolCalls: json.RawMessage(`{"a":1}`)}}, Options{}},
		{"tools", []Message{text("user", "x")}, Options{Tools: json.RawMessage(`[1,`)}},
		{"deep tools", []Message{text("user", "x")}, Options{Tools: json.RawMessage(strings.Repeat("[", 5000) + strings.Repeat("]", 5000))}},
	} {
		if _, err := parse(t, stringsOnly).Render(c.messages, c.opts); !errors.Is(err, ErrMessages) {
			t.Errorf("%s: %v, want ErrMessages", c.name, err)
		}
	}
	// gonja panics on a remainder by zero, and cannot include what is not there.
	for _, source := range []string{`{{ 1 % 0 }}`, `{{ nothing.at.all() }}`, `{% include '/etc/passwd' %}`, `{{ range(10000000) }}`} {
		tpl, err := Parse(source)
		if err == nil {
			_, err = tpl.Render(nil, Options{})
		}
		if !errors.Is(err, ErrTemplate) {
			t.Errorf("%s: %v, want ErrTemplate", source, err)
		}
	}
	for _, source := range []string{`{% if %}`, `{{ 'a }}`, `{{ (1 }}`, `{% for x in %}`, `{# no end`, `{% raw %}`, `{{ [1) }}`, `{% nonsense %}`, `{{ x`} {
		if _, err := Parse(source); !errors.Is(err, ErrTemplate) {
			t.Errorf("Parse(%q): %v, want ErrTemplate", source, err)
		}
	}
}

func TestLoad(t *testing.T) {
	const jinja, old, config = "{{ 'jinja' }}", `{"chat_template": "{{ 'json' }}"}`, `{"chat_template": "{{ 'config' }}"}`
	for _, c := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"jinja first", map[string]string{"chat_template.jinja": jinja, "chat_template.json": old, "tokenizer_config.json": config}, "jinja"},
		{"json second", map[string]string{"chat_template.json": old, "tokenizer_config.json": config}, "json"},
		{"config third", map[string]string{"tokenizer_config.json": config}, "config"},
		{"named", map[string]string{"tokenizer_config.json": `{"chat_template": [{"name":"tool_use","template":"{{ 'tools' }}"},{"name":"default","template":"{{ 'named' }}"}]}`}, "named"},
	} {
		tpl, err := Load(folder(t, c.files))
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if got, err := tpl.Render(nil, Options{}); err != nil || got != c.want {
			t.Errorf("%s: %q, %v", c.name, got, err)
		}
	}
	for name, files := range map[string]map[string]string{
		"empty":      {},
		"null":       {"tokenizer_config.json": `{"chat_template": null}`},
		"no default": {"tokenizer_config.json": `{"chat_template": [{"name":"rag","template":""}]}`},
	} {
		if _, err := Load(folder(t, files)); !errors.Is(err, ErrNoTemplate) {
			t.Errorf("%s: %v, want ErrNoTemplate", name, err)
		}
	}
	for name, files := range map[string]map[string]string{
		"cut JSON":     {"tokenizer_config.json": `{`},
		"number":       {"chat_template.json": `{"chat_template": 7}`},
		"bad template": {"chat_template.jinja": `{% if %}`},
	} {
		if _, err := Load(folder(t, files)); err == nil || errors.Is(err, ErrNoTemplate) {
			t.Errorf("%s: %v, want another error", name, err)
		}
	}
}

// folder writes files to a new folder.
func folder(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestVariables(t *testing.T) {
	tpl := parse(t, `{{ bos_token }}{{ strftime_now('%d %b %Y, %-d, %H:%M, 100%%') }}{{ eos_token }}|{{ deep.a[0].b }}|{{ count + 1 }}|{{ tools is none }}`)
	tpl.now = func() time.Time { return time.Date(2026, 11, 3, 4, 5, 6, 0, time.UTC) }
	got, err := tpl.Render(nil, Options{BOS: "<s>", EOS: "</s>", Kwargs: map[string]any{
		"deep":  map[string]any{"a": []any{map[string]any{"b": "c"}}},
		"count": 2.0, // as encoding/json decodes 2
	}})
	if want := "<s>03 Nov 2026, 3, 04:05, 100%</s>|c|3|True"; err != nil || got != want {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
}

func TestConcurrentRender(t *testing.T) {
	tpl := parse(t, viaMacro)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			s := strings.Repeat("x", i+1)
			for range 50 {
				got, err := tpl.Render([]Message{text("user", s)}, Options{})
				if want := "[" + s + "]"; err != nil || got != want {
					t.Errorf("%q, %v; want %q", got, err, want)
				}
			}
		})
	}
	wg.Wait()
}
