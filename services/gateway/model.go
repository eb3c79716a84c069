package gateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"trireme.dev/services/gateway/openai"
	"trireme.dev/services/gateway/request"
	"trireme.dev/shared/chat"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/token"
)

// Model is what the gateway knows of the model that the stages run: everything but its weights. It does not change.
type Model struct {
	Config     model.Config
	Generation hf.Generation
	Tokenizer  *token.Tokenizer
	Template   *chat.Template // nil: the model has none, so it does not chat

	// Measure returns the patch grid of an encoded picture (frames, rows, columns) from its header, and the number of
	// tokens that it becomes. nil for a model without vision.
	Measure func(data []byte) (grid [3]int, tokens int, err error)

	bos, eos string // for the template
	longest  int    // bytes of the longest token
}

// NewModel reads a model folder. measure belongs to the same folder.
func NewModel(dir string, measure func([]byte) ([3]int, int, error)) (*Model, error) {
	m := &Model{}
	var err error
	if m.Config, m.Generation, err = hf.ReadConfig(dir); err != nil {
		return nil, err
	}
	if m.Config.Vision != nil {
		m.Measure = measure
	}
	if m.Tokenizer, err = token.Load(dir); err != nil {
		return nil, err
	}
	if m.Template, err = chat.Load(dir); err != nil && !errors.Is(err, chat.ErrNoTemplate) {
		return nil, err
	}
	for id := range m.Tokenizer.Size() {
		b, _, _ := m.Tokenizer.Token(id)
		m.longest = max(m.longest, len(b))
	}
	if m.bos, m.eos, err = specialTokens(filepath.Join(dir, "tokenizer_config.json")); err != nil {
		return nil, err
	}
	return m, nil
}

// specialTokens reads bos_token and eos_token, each null, a string or an object with content.
func specialTokens(path string) (bos, eos string, err error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", "", nil
	}
	if err != nil {
		return "", "", err
	}
	var file struct {
		BOS specialToken `json:"bos_token"`
		EOS specialToken `json:"eos_token"`
	}
	if err := json.Unmarshal(data, &file); err != nil {
		return "", "", fmt.Errorf("%s: %w", path, err)
	}
	return string(file.BOS), string(file.EOS), nil
}

type specialToken string

// UnmarshalJSON takes both forms that transformers writes.
func (s *specialToken) UnmarshalJSON(raw []byte) error {
	var plain *string
	if json.Unmarshal(raw, &plain) == nil {
		if plain != nil {
			*s = specialToken(*plain)
		}
		return nil
	}
	var object struct{ Content string }
	err := json.Unmarshal(raw, &object)
	*s = specialToken(object.Content)
	return err
}

// stream is the decoder of one choice's text.
func (m *Model) stream(p *openai.Params) func() request.TextStream {
	return func() request.TextStream { return m.Tokenizer.Stream(p.SkipSpecial) }
}

// tooLong reports whether a text certainly has more tokens than the context, from its length alone, so that a text of
// many megabytes is refused without cutting it into tokens. The factor allows for normalisation, which can shorten a
// text (NFC at most threefold in UTF-8, Unicode Standard Annex 15, section 12).
func (m *Model) tooLong(text string) bool {
	return len(text)/3 > m.Config.Text.Context*max(m.longest, 1)
}

// need is the device memory for KV that a request may come to use which generates up to tokens, in bytes: slabs for
// the prompt and all that is generated (choices share the prompt's blocks but for the open one, which a spare slab each
// stands for).
func (m *Model) need(prompt, tokens, choices int) int64 {
	slabs := kv.Slabs(prompt+tokens) + (choices-1)*(kv.Slabs(tokens)+1)
	return int64(slabs) * kv.SlabBytes(&m.Config.Text)
}

// logs is the device memory of a request's token logs, in bytes, which are made for the longest answer; with what is
// lost to pages.
func (m *Model) logs(prompt, maxTokens, choices, top int) int64 {
	shape := kv.LogShape{Prompt: prompt, MaxTokens: maxTokens, MaxSlabs: kv.Slabs(prompt+maxTokens) + 2, Top: max(top, 0)}
	return int64(choices) * mem.Padded(shape.Bytes(), mem.HostPage)
}

// mm is the device memory of one picture's MM object, in bytes; with what is lost to pages.
func (m *Model) mm(tokens int) int64 {
	if v := m.Config.Vision; v != nil {
		return mem.Padded(int64(tokens)*int64(v.Levels()*v.Out*4), mem.HostPage)
	}
	return 0
}

// stopIDs are the ids that end a choice.
func (m *Model) stopIDs(p *openai.Params) []int32 {
	var ids []int32
	if !p.IgnoreEOS {
		for _, id := range m.Generation.EOS {
			ids = append(ids, int32(id))
		}
	}
	ids = append(ids, p.StopTokenIDs...)
	slices.Sort(ids)
	return slices.Compact(ids)
}
