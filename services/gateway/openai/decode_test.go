package openai

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const hello = `"messages":[{"role":"user","content":"hi"}]`

func TestBadRequestsNameTheParameter(t *testing.T) {
	chat := func(members string) string { return `{"model":"m",` + members + `}` }
	message := func(m string) string { return chat(`"messages":[` + m + `]`) }
	part := func(p string) string { return message(`{"role":"user","content":[` + p + `]}`) }
	for _, test := range []struct{ name, body, param, code string }{
		{"empty", ``, "", "invalid_json"},
		{"cut", `{"model":"m","messages":[`, "", "invalid_json"},
		{"trailing", `{"model":"m"} x`, "", "invalid_json"},
		{"no object", `["m"]`, "", ""},
		{"deep", strings.Repeat(`[`, 20000) + strings.Repeat(`]`, 20000), "", "invalid_json"},
		{"model is a number", `{"model":3,` + hello + `}`, "model", "invalid_type"},
		{"no messages", chat(`"x":1`), "messages", ""},
		{"messages null", chat(`"messages":null`), "messages", ""},
		{"messages is a string", chat(`"messages":"hi"`), "messages", "invalid_type"},
		{"zero messages", chat(`"messages":[]`), "messages", "invalid_value"},
		{"message is a string", message(`"hi"`), "messages[0]", "invalid_type"},
		{"no role", message(`{"content":"hi"}`), "messages[0].role", ""},
		{"role is a number", message(`{"role":1,"content":"hi"}`), "messages[0].role", "invalid_type"},
		{"unknown role", message(`{"role":"robot","content":"hi"}`), "messages[0].role", "invalid_value"},
		{"no content", message(`{"role":"user"}`), "messages[0].content", ""},
		{"content is a number", message(`{"role":"user","content":5}`), "messages[0].content", "invalid_type"},
		{"second message", message(`{"role":"user","content":"a"},{"role":"x","content":"b"}`), "messages[1].role", "invalid_value"},
		{"part is a string", part(`"hi"`), "messages[0].content[0]", "invalid_type"},
		{"part without type", part(`{"text":"hi"}`), "messages[0].content[0].type", ""},
		{"unknown part", part(`{"type":"video_url","video_url":{"url":"x"}}`), "messages[0].content[0].type", "invalid_value"},
		{"text part without text", part(`{"type":"text"}`), "messages[0].content[0].text", ""},
		{"text is a number", part(`{"type":"text","text":1}`), "messages[0].content[0].text", "invalid_type"},
		{"picture without url", part(`{"type":"image_url"}`), "messages[0].content[0].image_url", ""},
		{"picture url missing", part(`{"type":"text","text":"a"},{"type":"image_url","image_url":{}}`), "messages[0].content[1].image_url.url", ""},
		{"picture url is a number", part(`{"type":"image_url","image_url":{"url":7}}`), "messages[0].content[0].image_url.url", "invalid_type"},
		{"picture url empty", part(`{"type":"image_url","image_url":{"url":""}}`), "messages[0].content[0].image_url.url", ""},
		{"negative max_tokens", chat(hello + `,"max_tokens":-1`), "max_tokens", "invalid_value"},
		{"zero max_tokens", chat(hello + `,"max_tokens":0`), "max_tokens", "invalid_value"},
		{"max_tokens is a string", chat(hello + `,"max_tokens":"5"`), "max_tokens", "invalid_type"},
		{"max_tokens is a fraction", chat(hello + `,"max_tokens":1.5`), "max_tokens", "invalid_type"},
		{"max_completion_tokens", chat(hello + `,"max_completion_tokens":-5`), "max_completion_tokens", "invalid_value"},
		{"n zero", chat(hello + `,"n":0`), "n", "invalid_value"},
		{"n huge", chat(hello + `,"n":1e99`), "n", "invalid_value"},
		{"temperature high", chat(hello + `,"temperature":2.1`), "temperature", "invalid_value"},
		{"temperature negative", chat(hello + `,"temperature":-0.1`), "temperature", "invalid_value"},
		{"temperature is a string", chat(hello + `,"temperature":"hot"`), "temperature", "invalid_type"},
		{"temperature beyond floats", chat(hello + `,"temperature":1e999`), "temperature", "invalid_value"},
		{"top_p zero", chat(hello + `,"top_p":0`), "top_p", "invalid_value"},
		{"top_k", chat(hello + `,"top_k":-2`), "top_k", "invalid_value"},
		{"min_p", chat(hello + `,"min_p":1.5`), "min_p", "invalid_value"},
		{"repetition_penalty", chat(hello + `,"repetition_penalty":0`), "repetition_penalty", "invalid_value"},
		{"presence_penalty", chat(hello + `,"presence_penalty":3`), "presence_penalty", "invalid_value"},
		{"seed", chat(hello + `,"seed":"x"`), "seed", "invalid_type"},
		{"seed beyond 64 bits", chat(hello + `,"seed":1180591620717411303424`), "seed", "invalid_value"},
		{"seed just beyond", chat(hello + `,"seed":9223372036854775808`), "seed", "invalid_value"},
		{"seed just below", chat(hello + `,"seed":-9223372036854777857`), "seed", "invalid_value"},
		{"seed infinite", chat(hello + `,"seed":-1e999`), "seed", "invalid_value"},
		{"max_tokens huge", chat(hello + `,"max_tokens":1e30`), "max_tokens", "invalid_value"},
		{"stop is a number", chat(hello + `,"stop":5`), "stop", "invalid_type"},
		{"stop holds a number", chat(hello + `,"stop":["a",5]`), "stop[1]", "invalid_type"},
		{"stop empty", chat(hello + `,"stop":""`), "stop", "invalid_value"},
		{"stop_token_ids", chat(hello + `,"stop_token_ids":[-1]`), "stop_token_ids", ""},
		{"min above max", chat(hello + `,"min_tokens":9,"max_tokens":3`), "min_tokens", "invalid_value"},
		{"top_logprobs alone", chat(hello + `,"top_logprobs":3`), "top_logprobs", ""},
		{"top_logprobs high", chat(hello + `,"logprobs":true,"top_logprobs":21`), "top_logprobs", "invalid_value"},
		{"logprobs is a number", chat(hello + `,"logprobs":3`), "logprobs", "invalid_type"},
		{"stream is a string", chat(hello + `,"stream":"yes"`), "stream", "invalid_type"},
		{"stream_options alone", chat(hello + `,"stream_options":{"include_usage":true}`), "stream_options", ""},
		{"include_usage", chat(hello + `,"stream":true,"stream_options":{"include_usage":1}`), "stream_options.include_usage", "invalid_type"},
		{"kwargs", chat(hello + `,"chat_template_kwargs":[]`), "chat_template_kwargs", "invalid_type"},
		{"logit_bias", chat(hello + `,"logit_bias":{"5":1}`), "logit_bias", "unsupported_parameter"},
		{"response_format", chat(hello + `,"response_format":{"type":"json_object"}`), "response_format", "unsupported_parameter"},
		{"tool_choice", chat(hello + `,"tool_choice":"required"`), "tool_choice", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := DecodeChat([]byte(test.body))
			e := (*Error)(nil)
			if !errors.As(err, &e) {
				t.Fatalf("got %v", err)
			}
			if e.Status != http.StatusBadRequest || e.Param != test.param || (test.code != "" && e.Code != test.code) || e.Message == "" {
				t.Errorf("got %d %q %q %q, want 400 %q %q", e.Status, e.Param, e.Code, e.Message, test.param, test.code)
			}
		})
	}
	for _, test := range []struct{ name, body, param string }{
		{"no prompt", `{}`, "prompt"},
		{"number", `{"prompt":5}`, "prompt"},
		{"no prompts", `{"prompt":[]}`, "prompt"},
		{"mixed", `{"prompt":["a",[1]]}`, "prompt[1]"},
		{"mixed ids", `{"prompt":[1,"a"]}`, "prompt"},
		{"negative id", `{"prompt":[1,-1]}`, "prompt"},
		{"object", `{"prompt":[{}]}`, "prompt[0]"},
		{"echo with logprobs", `{"prompt":"a","echo":true,"logprobs":1}`, "echo"},
		{"logprobs", `{"prompt":"a","logprobs":true}`, "logprobs"},
		{"suffix", `{"prompt":"a","suffix":"b"}`, "suffix"},
		{"best_of", `{"prompt":"a","best_of":3}`, "best_of"},
	} {
		t.Run("completions "+test.name, func(t *testing.T) {
			_, err := DecodeCompletion([]byte(test.body))
			e := (*Error)(nil)
			if !errors.As(err, &e) || e.Status != http.StatusBadRequest || e.Param != test.param {
				t.Errorf("got %+v, want 400 %q", err, test.param)
			}
		})
	}
}

func TestDecodeChat(t *testing.T) {
	got, err := DecodeChat([]byte(`{
		"model": "m", "unknown": {"a": [1, "}]"]}, "max_tokens": 5, "max_completion_tokens": 7.0, "temperature": null,
		"top_k": -1, "n": 2, "seed": -3, "stop": ["a", "\u0062\"\\"], "stop_token_ids": [4], "logprobs": true,
		"top_logprobs": 3, "stream": true, "stream_options": {"include_usage": true}, "logit_bias": { },
		"chat_template_kwargs": {"enable_thinking": false}, "response_format": {"type": "text"},
		"messages": [
			{"role": "developer", "content": "be\nkind"},
			{"role": "assistant", "content": null, "tool_calls": [{"id": "x"}]},
			{"role": "user", "content": [ {"type": "text", "text": "é ]}"} , {"type":"image_url","image_url":{"url":"data:,x","detail":"low"}}]}
		]
	}`))
	if err != nil {
		t.Fatal(err)
	}
	seven, zero, seed := 7, 0, ^uint64(2)
	want := &Chat{
		Params: Params{Model: "m", MaxTokens: &seven, TopK: &zero, N: 2, Seed: &seed, Stop: []string{"a", `b"\`},
			StopTokenIDs: []int32{4}, Logprobs: 3, Stream: true, IncludeUsage: true, SkipSpecial: true},
		Kwargs:              []byte(`{"enable_thinking": false}`),
		AddGenerationPrompt: true,
		Messages: []Message{
			{Role: "system", Content: []Part{{Text: "be\nkind"}}},
			{Role: "assistant", Extra: map[string][]byte{"tool_calls": []byte(`[{"id": "x"}]`)}},
			{Role: "user", Content: []Part{{Text: "é ]}"}, {URL: "data:,x", Param: "messages[2].content[1].image_url.url"}}},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestDecodePrompts(t *testing.T) {
	for body, want := range map[string][]Prompt{
		`{"prompt":"hi"}`:          {{Text: "hi"}},
		`{"prompt":["a", "b"]}`:    {{Text: "a"}, {Text: "b"}},
		`{"prompt":[1, 2.0]}`:      {{IDs: []int32{1, 2}}},
		`{"prompt":[[1,2], [3] ]}`: {{IDs: []int32{1, 2}}, {IDs: []int32{3}}},
	} {
		got, err := DecodeCompletion([]byte(body))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got.Prompts); diff != "" {
			t.Errorf("%s: %s", body, diff)
		}
	}
}

// FuzzScan takes any JSON apart and compares with encoding/json.
func FuzzScan(f *testing.F) {
	for _, s := range []string{`{}`, `[]`, ` { "a" : [ 1 , "\"}\\" , {"b":null} ] , "c\u00e9":-1.5e3 } `, `["\\","\\\"",[[]],{}]`, `"x"`, `7`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		if !json.Valid(body) {
			return
		}
		var want any
		if json.Unmarshal(body, &want) != nil {
			return // numbers beyond float64
		}
		if diff := cmp.Diff(want, rebuild(t, trim(body))); diff != "" {
			t.Fatal(diff)
		}
	})
}

func rebuild(t *testing.T, raw []byte) any {
	switch raw[0] {
	case '{':
		m := map[string]any{}
		for k, v := range members(raw) {
			m[k] = rebuild(t, v)
		}
		return m
	case '[':
		a := []any{}
		for i, v := range elements(raw) {
			if i != len(a) {
				t.Fatalf("element %d is called %d", len(a), i)
			}
			a = append(a, rebuild(t, v))
		}
		return a
	case '"':
		return text(raw)
	}
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatalf("%q: %v", raw, err)
	}
	return v
}

// FuzzDecode feeds any bytes to both decoders: they must answer with a request that is within its bounds, or with an
// error object for a client.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"model":"m",` + hello + `,"n":2,"stop":["a"],"temperature":0.5}`))
	f.Add([]byte(`{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:,"}}]}]}`))
	f.Add([]byte(`{"prompt":[[1,2],[3]],"logprobs":5,"echo":true}`))
	f.Add([]byte(`{"prompt":"a","max_tokens":1e5,"seed":-1,"stream":true,"stream_options":{}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		check := func(p *Params, err error) {
			if err != nil {
				e := (*Error)(nil)
				if !errors.As(err, &e) || e.Status != http.StatusBadRequest || !json.Valid(e.JSON()) {
					t.Fatalf("error is %#v", err)
				}
				return
			}
			if p.N < 1 || p.N > MaxChoices || p.Logprobs > MaxLogprobs || (p.MaxTokens != nil && *p.MaxTokens < 1) ||
				(p.Temperature != nil && !(*p.Temperature >= 0 && *p.Temperature <= 2)) {
				t.Fatalf("out of bounds: %+v", p)
			}
		}
		chat, err := DecodeChat(body)
		if chat == nil {
			chat = &Chat{}
		}
		check(&chat.Params, err)
		completion, err := DecodeCompletion(body)
		if completion == nil {
			completion = &Completion{}
		}
		check(&completion.Params, err)
	})
}
