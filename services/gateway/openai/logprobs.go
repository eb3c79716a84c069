package openai

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// leastLogprob stands for minus infinity, which JSON cannot say (vLLM's value).
const leastLogprob = -9999

// Vocabulary gives the bytes of tokens (shared/token's Tokenizer does).
type Vocabulary interface {
	Token(id int) (bytes []byte, special, ok bool)
}

// TokenLogprob is a token's log probability with its alternatives, not yet in either endpoint's shape.
type TokenLogprob struct {
	ID      int32
	Logprob float32
	TopIDs  []int32 // falling probability
	Top     []float32
}

// ChatLogprobs is logprobs of a chat choice.
type ChatLogprobs struct {
	Content []ChatLogprob `json:"content"`
	Refusal []ChatLogprob `json:"refusal"` // always null
}

// ChatLogprob is one token of ChatLogprobs.
type ChatLogprob struct {
	Token   string           `json:"token"`
	Logprob float32          `json:"logprob"`
	Bytes   []int            `json:"bytes"` // null when the token has no bytes
	Top     []ChatTopLogprob `json:"top_logprobs"`
}

// ChatTopLogprob is one alternative of a ChatLogprob.
type ChatTopLogprob struct {
	Token   string  `json:"token"`
	Logprob float32 `json:"logprob"`
	Bytes   []int   `json:"bytes"`
}

// Append adds a token.
func (l *ChatLogprobs) Append(v Vocabulary, t *TokenLogprob) {
	text, raw := chatToken(v, t.ID)
	out := ChatLogprob{Token: text, Bytes: raw, Logprob: max(t.Logprob, leastLogprob), Top: []ChatTopLogprob{}}
	for i, id := range t.TopIDs {
		text, raw := chatToken(v, id)
		out.Top = append(out.Top, ChatTopLogprob{Token: text, Bytes: raw, Logprob: max(t.Top[i], leastLogprob)})
	}
	l.Content = append(l.Content, out)
}

// chatToken gives a token's text, with U+FFFD for what is no whole character, and its exact bytes.
func chatToken(v Vocabulary, id int32) (string, []int) {
	b, _, ok := v.Token(int(id))
	if !ok {
		return "", nil
	}
	raw := make([]int, len(b))
	for i, c := range b {
		raw[i] = int(c)
	}
	return strings.ToValidUTF8(string(b), string(utf8.RuneError)), raw
}

// TextLogprobs is logprobs of a choice of /v1/completions. Its lists run in parallel.
type TextLogprobs struct {
	Tokens        []string             `json:"tokens"`
	TokenLogprobs []float32            `json:"token_logprobs"`
	TopLogprobs   []map[string]float32 `json:"top_logprobs"`
	TextOffset    []int                `json:"text_offset"` // characters of the answer before the token
}

// Append adds a token and returns the offset of the one after it. As in vLLM the token that was taken is among the
// alternatives, even when it is not one of the best.
func (l *TextLogprobs) Append(v Vocabulary, t *TokenLogprob, offset int) (next int) {
	name := textToken(v, t.ID)
	l.Tokens = append(l.Tokens, name)
	l.TokenLogprobs = append(l.TokenLogprobs, max(t.Logprob, leastLogprob))
	top := make(map[string]float32, len(t.TopIDs)+1)
	for i, id := range t.TopIDs {
		top[textToken(v, id)] = max(t.Top[i], leastLogprob)
	}
	top[name] = max(t.Logprob, leastLogprob)
	l.TopLogprobs = append(l.TopLogprobs, top)
	l.TextOffset = append(l.TextOffset, offset)
	return offset + utf8.RuneCountInString(name)
}

// textToken names a token; one that is no whole text reads bytes:\xe2\x82, so that names differ.
func textToken(v Vocabulary, id int32) string {
	b, _, _ := v.Token(int(id))
	if utf8.Valid(b) {
		return string(b)
	}
	var s strings.Builder
	s.WriteString("bytes:")
	for _, c := range b {
		fmt.Fprintf(&s, `\x%02x`, c)
	}
	return s.String()
}
