package openai

import (
	"bytes"
	"encoding/json"
)

// Usage counts tokens.
type Usage struct {
	PromptTokens     int           `json:"prompt_tokens"`
	CompletionTokens int           `json:"completion_tokens"`
	TotalTokens      int           `json:"total_tokens"`
	PromptDetails    PromptDetails `json:"prompt_tokens_details"`
}

// PromptDetails says where prompt tokens came from.
type PromptDetails struct {
	CachedTokens int  `json:"cached_tokens"`           // taken from the prefix cache, not computed
	CachedImages *int `json:"cached_images,omitempty"` // taken from the cache, not encoded; nil for a prompt without pictures
}

// Add adds another prompt's tokens.
func (u *Usage) Add(prompt, completion, cached int) {
	u.PromptTokens += prompt
	u.CompletionTokens += completion
	u.TotalTokens += prompt + completion
	u.PromptDetails.CachedTokens += cached
}

// AddPictures adds the pictures of a prompt, of which so many were cached.
func (u *Usage) AddPictures(cached int) {
	if u.PromptDetails.CachedImages != nil {
		cached += *u.PromptDetails.CachedImages
	}
	u.PromptDetails.CachedImages = &cached
}

// ChatCompletion is the answer to a request that does not stream.
type ChatCompletion struct {
	ID      string       `json:"id"`
	Object  string       `json:"object"` // chat.completion
	Created int64        `json:"created"`
	Model   string       `json:"model"`
	Choices []ChatChoice `json:"choices"`
	Usage   Usage        `json:"usage"`
}

// ChatChoice is one choice of a ChatCompletion.
type ChatChoice struct {
	Index        int           `json:"index"`
	Message      ChatMessage   `json:"message"`
	Logprobs     *ChatLogprobs `json:"logprobs"`
	FinishReason string        `json:"finish_reason"`
	StopReason   StopReason    `json:"stop_reason"`
}

// ChatMessage is the assistant's turn.
type ChatMessage struct {
	Role    string  `json:"role"`
	Content string  `json:"content"`
	Refusal *string `json:"refusal"` // always null
}

// TextCompletion is the answer of /v1/completions.
type TextCompletion struct {
	ID      string       `json:"id"`
	Object  string       `json:"object"` // text_completion
	Created int64        `json:"created"`
	Model   string       `json:"model"`
	Choices []TextChoice `json:"choices"`
	Usage   Usage        `json:"usage"`
}

// TextChoice is one choice of a TextCompletion.
type TextChoice struct {
	Index        int           `json:"index"`
	Text         string        `json:"text"`
	Logprobs     *TextLogprobs `json:"logprobs"`
	FinishReason string        `json:"finish_reason"`
	StopReason   StopReason    `json:"stop_reason"`
}

// StopReason is what ended a choice, as in vLLM: the stop string, an id of stop_token_ids, else null.
type StopReason struct {
	Word string
	ID   int32 // counts if Word is empty and IsID is set
	IsID bool
}

// MarshalJSON gives a string, a number or null.
func (s StopReason) MarshalJSON() ([]byte, error) { return s.append(nil), nil }

// Models is the answer of GET /v1/models.
type Models struct {
	Object string  `json:"object"` // list
	Data   []Model `json:"data"`
}

// Model is one model that is served.
type Model struct {
	ID          string `json:"id"`
	Object      string `json:"object"` // model
	Created     int64  `json:"created"`
	OwnedBy     string `json:"owned_by"`
	MaxModelLen int    `json:"max_model_len"`   // tokens of context, as vLLM reports it
	Paced       string `json:"paced,omitempty"` // not OpenAI's: the profile that the NPUs are slowed down to
}

// Encode encodes an answer, with <, > and & as they are.
func Encode(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}
