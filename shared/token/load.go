package token

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

var (
	// ErrUnsupported is wrapped by [Load]'s error when tokenizer.json is well formed but asks for something that this
	// package does not do.
	ErrUnsupported = errors.New("unsupported tokenizer")

	// ErrMalformed is wrapped by [Load]'s error when tokenizer.json is not JSON or contradicts itself.
	ErrMalformed = errors.New("malformed tokenizer.json")
)

// maxID bounds the table of tokens against a hostile file. The largest public vocabularies have some 300,000 tokens.
const maxID = 1 << 21

// Load reads the tokenizer of a Hugging Face model folder: dir/tokenizer.json, or dir itself if it is a file.
func Load(dir string) (*Tokenizer, error) {
	path := dir
	if info, err := os.Stat(dir); err == nil && info.IsDir() {
		path = filepath.Join(dir, "tokenizer.json")
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("loading tokenizer: %w", err)
	}
	t, err := parse(data)
	if err != nil {
		return nil, fmt.Errorf("loading tokenizer %s: %w", path, err)
	}
	return t, nil
}

// file is tokenizer.json as Hugging Face tokenizers writes it. Truncation and padding are the caller's affair.
type file struct {
	AddedTokens   []addedToken `json:"added_tokens"`
	Normalizer    *step        `json:"normalizer"`
	PreTokenizer  *step        `json:"pre_tokenizer"`
	PostProcessor *step        `json:"post_processor"`
	Decoder       *step        `json:"decoder"`
	Model         struct {
		Type                    string           `json:"type"`
		Dropout                 *float64         `json:"dropout"`
		ContinuingSubwordPrefix string           `json:"continuing_subword_prefix"`
		EndOfWordSuffix         string           `json:"end_of_word_suffix"`
		ByteFallback            bool             `json:"byte_fallback"`
		IgnoreMerges            bool             `json:"ignore_merges"`
		Vocab                   map[string]int32 `json:"vocab"`
		Merges                  json.RawMessage  `json:"merges"`
	} `json:"model"`
}

// step is any normalizer, pre-tokenizer, post-processor or decoder: those fields that matter here.
type step struct {
	Type           string  `json:"type"`
	Pretokenizers  []*step `json:"pretokenizers"`
	Normalizers    []*step `json:"normalizers"`
	Behavior       string  `json:"behavior"`
	Invert         bool    `json:"invert"`
	AddPrefixSpace bool    `json:"add_prefix_space"`
	UseRegex       *bool   `json:"use_regex"` // true if absent
	Pattern        struct {
		Regex  *string `json:"Regex"`
		String *string `json:"String"`
	} `json:"pattern"`
}

// parse builds a tokenizer from the contents of tokenizer.json.
func parse(data []byte) (*Tokenizer, error) {
	var f file
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	t := &Tokenizer{cache: newWordCache()}
	var err error
	if t.nfc, err = f.normalizes(); err != nil {
		return nil, err
	}
	if t.split, err = f.splitter(); err != nil {
		return nil, err
	}
	if err := f.checkRest(); err != nil {
		return nil, err
	}
	if err := t.setVocab(f.Model.Vocab); err != nil {
		return nil, err
	}
	if err := t.setMerges(f.Model.Merges); err != nil {
		return nil, err
	}
	if err := t.setAdded(f.AddedTokens); err != nil {
		return nil, err
	}
	return t, nil
}

// normalizes says whether text is normalised to NFC, the only normaliser known.
func (f *file) normalizes() (bool, error) {
	n := f.Normalizer
	for n != nil && n.Type == "Sequence" && len(n.Normalizers) == 1 {
		n = n.Normalizers[0]
	}
	switch {
	case n == nil || n.Type == "Sequence" && len(n.Normalizers) == 0:
		return false, nil
	case n.Type == "NFC":
		return true, nil
	}
	return false, fmt.Errorf("%w: normalizer %q", ErrUnsupported, n.Type)
}

// splitter returns the scanner that the pre-tokenizer, a Split and then a ByteLevel without its own pattern, asks for.
func (f *file) splitter() (splitter, error) {
	p := f.PreTokenizer
	if p == nil || p.Type != "Sequence" || len(p.Pretokenizers) != 2 || p.Pretokenizers[0] == nil || p.Pretokenizers[1] == nil {
		return splitter{}, fmt.Errorf("%w: the pre-tokenizer is not a sequence of Split and ByteLevel", ErrUnsupported)
	}
	split, bytes := p.Pretokenizers[0], p.Pretokenizers[1]
	if split.Type != "Split" || split.Behavior != "Isolated" || split.Invert || split.Pattern.Regex == nil {
		return splitter{}, fmt.Errorf("%w: pre-tokenizer %q is not an isolating Split by a regular expression", ErrUnsupported, split.Type)
	}
	if bytes.Type != "ByteLevel" || bytes.AddPrefixSpace || bytes.UseRegex == nil || *bytes.UseRegex {
		return splitter{}, fmt.Errorf("%w: pre-tokenizer %q is not a ByteLevel without prefix space and pattern", ErrUnsupported, bytes.Type)
	}
	return newSplitter(*split.Pattern.Regex)
}

// checkRest refuses settings that would change ids or text and are not done here. unk_token and fuse_unk cannot matter:
// every byte has a token.
func (f *file) checkRest() error {
	m := &f.Model
	switch {
	case m.Type != "BPE" && m.Type != "":
		return fmt.Errorf("%w: model type %q is not BPE", ErrUnsupported, m.Type)
	case m.Dropout != nil && *m.Dropout != 0:
		return fmt.Errorf("%w: dropout", ErrUnsupported)
	case m.ContinuingSubwordPrefix != "" || m.EndOfWordSuffix != "":
		return fmt.Errorf("%w: continuing_subword_prefix or end_of_word_suffix", ErrUnsupported)
	case m.ByteFallback:
		return fmt.Errorf("%w: byte_fallback", ErrUnsupported)
	case m.IgnoreMerges:
		return fmt.Errorf("%w: ignore_merges", ErrUnsupported)
	case f.PostProcessor != nil && f.PostProcessor.Type != "ByteLevel":
		return fmt.Errorf("%w: post-processor %q", ErrUnsupported, f.PostProcessor.Type)
	case f.Decoder == nil || f.Decoder.Type != "ByteLevel":
		return fmt.Errorf("%w: the decoder is not ByteLevel", ErrUnsupported)
	}
	return nil
}

// setVocab fills the tables of the model's own tokens.
func (t *Tokenizer) setVocab(vocab map[string]int32) error {
	if len(vocab) == 0 {
		return fmt.Errorf("%w: the vocabulary is empty", ErrMalformed)
	}
	runes, alphabet := byteLevel()
	t.vocab = vocab
	for token, id := range vocab {
		if token == "" {
			return fmt.Errorf("%w: token %d is empty", ErrMalformed, id)
		}
		raw, ok := fromByteLevel(token, alphabet)
		if !ok {
			raw = []byte(token) // as Hugging Face decodes it; no merge of bytes leads to it
		}
		if err := t.setToken(id, raw, false); err != nil {
			return err
		}
	}
	for b := range t.bytes {
		id, ok := vocab[string(runes[b])]
		if !ok {
			id = -1
			// UTF-8 never holds these two leads, nor those above U+10FFFF.
			if b != 0xC0 && b != 0xC1 && b <= 0xF4 {
				return fmt.Errorf("%w: the vocabulary has no token for byte 0x%02X", ErrUnsupported, b)
			}
		}
		t.bytes[b] = id
	}
	return nil
}

// setToken names one id.
func (t *Tokenizer) setToken(id int32, raw []byte, special bool) error {
	if id < 0 || id >= maxID {
		return fmt.Errorf("%w: id %d of token %q is not in 0 to %d", ErrMalformed, id, raw, maxID-1)
	}
	if n := int(id) + 1; n > len(t.tokens) {
		t.tokens = append(t.tokens, make([]entry, n-len(t.tokens))...)
	}
	if had := t.tokens[id].bytes; had != nil {
		return fmt.Errorf("%w: tokens %q and %q share id %d", ErrMalformed, had, raw, id)
	}
	t.tokens[id] = entry{bytes: raw, special: special}
	return nil
}

// setMerges reads the merges, in the order of their rank, each "a b" (tokenizers before 0.20) or ["a", "b"].
func (t *Tokenizer) setMerges(data json.RawMessage) error {
	var pairs [][2]string
	if len(data) > 0 && json.Unmarshal(data, &pairs) != nil {
		var lines []string
		if err := json.Unmarshal(data, &lines); err != nil {
			return fmt.Errorf("%w: merges are neither all pairs nor all strings: %w", ErrMalformed, err)
		}
		pairs = make([][2]string, len(lines))
		for i, line := range lines {
			left, right, ok := strings.Cut(line, " ")
			if !ok || strings.Contains(right, " ") {
				return fmt.Errorf("%w: merge %d, %q, is not two tokens", ErrMalformed, i, line)
			}
			pairs[i] = [2]string{left, right}
		}
	}
	t.merges = make(map[pair]merge, len(pairs))
	for rank, p := range pairs {
		left, okLeft := t.vocab[p[0]]
		right, okRight := t.vocab[p[1]]
		id, ok := t.vocab[p[0]+p[1]]
		if !okLeft || !okRight || !ok {
			return fmt.Errorf("%w: merge %d, %q, uses a token that is not in the vocabulary", ErrMalformed, rank, p)
		}
		t.merges[pair{left, right}] = merge{rank: int32(rank), id: id}
	}
	return nil
}

// setAdded adds the added tokens. One that the vocabulary has too must have the same id there.
func (t *Tokenizer) setAdded(tokens []addedToken) error {
	t.special = make(map[string]int32, len(tokens))
	var raw, normalized []addedToken
	for _, a := range tokens {
		if a.Content == "" {
			return fmt.Errorf("%w: added token %d is empty", ErrMalformed, a.ID)
		}
		if id, ok := t.special[a.Content]; ok {
			return fmt.Errorf("%w: added token %q has the ids %d and %d", ErrMalformed, a.Content, id, a.ID)
		}
		if id, ok := t.vocab[a.Content]; ok && id == a.ID {
			t.tokens[id] = entry{bytes: []byte(a.Content), special: a.Special}
		} else if ok {
			return fmt.Errorf("%w: added token %q has id %d, in the vocabulary %d", ErrMalformed, a.Content, a.ID, id)
		} else if err := t.setToken(a.ID, []byte(a.Content), a.Special); err != nil {
			return err
		}
		t.special[a.Content] = a.ID
		if a.Normalized {
			if t.nfc {
				a.Content = nfc(a.Content)
			}
			normalized = append(normalized, a)
		} else {
			raw = append(raw, a)
		}
	}
	t.added, t.addedN = newAdded(raw), newAdded(normalized)
	return nil
}
