package openai

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

type words map[int]string

func (w words) Token(id int) ([]byte, bool, bool) {
	s, ok := w[id]
	return []byte(s), false, ok
}

func TestChunks(t *testing.T) {
	vocabulary := words{1: "a", 2: "\xe2\x82"}
	lp := &ChatLogprobs{}
	lp.Append(vocabulary, &TokenLogprob{ID: 2, Logprob: float32(math.Inf(-1)), TopIDs: []int32{1}, Top: []float32{-0.5}})
	for _, test := range []struct {
		name  string
		chat  bool
		usage bool
		chunk Chunk
		want  string
	}{
		{"role", true, false, Chunk{Role: true},
			`{"id":"c-1","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}`},
		{"text", true, true, Chunk{Index: 1, Text: "a\"\n"},
			`{"id":"c-1","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":1,"delta":{"content":"a\"\n"},"logprobs":null,"finish_reason":null}],"usage":null}`},
		{"end", true, false, Chunk{Finish: "stop", StopReason: StopReason{Word: "x"}},
			`{"id":"c-1","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":"x"}]}`},
		{"logprobs", true, false, Chunk{Text: "b", Logprobs: lp},
			`{"id":"c-1","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,"delta":{"content":"b"},"logprobs":{"content":[{"token":"\ufffd","logprob":-9999,"bytes":[226,130],"top_logprobs":[{"token":"a","logprob":-0.5,"bytes":[97]}]}],"refusal":null},"finish_reason":null}]}`},
		{"completion", false, false, Chunk{Text: "b", Finish: "length"},
			`{"id":"c-1","object":"text_completion","created":5,"model":"m","choices":[{"index":0,"text":"b","logprobs":null,"finish_reason":"length","stop_reason":null}]}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			b, err := NewChunks(test.chat, "c-1", "m", 5, test.usage).Append(nil, &test.chunk)
			if err != nil {
				t.Fatal(err)
			}
			s, ok := strings.CutPrefix(string(b), "data: ")
			if !ok || !strings.HasSuffix(s, "}\n\n") {
				t.Fatalf("no event: %q", b)
			}
			var got, want any
			if err := json.Unmarshal([]byte(s), &got); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal([]byte(test.want), &want); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestStringsAreJSON(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := string(rapid.SliceOf(rapid.Byte()).Draw(t, "bytes")) + rapid.String().Draw(t, "text") + "\u2028\u2029"
		raw := appendString(nil, s)
		var got string
		if err := json.Unmarshal(raw, &got); err != nil {
			t.Fatalf("%q: %v", raw, err)
		}
		if want := strings.ToValidUTF8(s, "\uFFFD"); strings.ReplaceAll(got, "\uFFFD", "") != strings.ReplaceAll(want, "\uFFFD", "") {
			t.Fatalf("got %q, want %q", got, want)
		}
		if strings.ContainsAny(string(raw), "\n\r\u2028") {
			t.Fatalf("%q would end a line", raw)
		}
	})
}

func TestTextLogprobs(t *testing.T) {
	vocabulary := words{1: "ab", 2: "\xe2\x82", 3: "é"}
	var l TextLogprobs
	at := l.Append(vocabulary, &TokenLogprob{ID: 3, Logprob: -1, TopIDs: []int32{1}, Top: []float32{-0.25}}, 4)
	if at = l.Append(vocabulary, &TokenLogprob{ID: 2, Logprob: -2}, at); at != 5+utf8.RuneCountInString(`bytes:\xe2\x82`) {
		t.Errorf("next offset %d", at)
	}
	want := TextLogprobs{
		Tokens: []string{"é", `bytes:\xe2\x82`}, TokenLogprobs: []float32{-1, -2}, TextOffset: []int{4, 5},
		TopLogprobs: []map[string]float32{{"ab": -0.25, "é": -1}, {`bytes:\xe2\x82`: -2}},
	}
	if diff := cmp.Diff(want, l); diff != "" {
		t.Error(diff)
	}
}
