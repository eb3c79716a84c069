package load

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"image/png"
	"strings"
	"testing"

	"github.com/openai/openai-go/v3"
)

func TestRequestsAreWhatTheyShallBe(t *testing.T) {
	s := Shape{
		Words: Span{3, 5}, Output: Span{10, 20}, Pictures: Span{0, 3}, Sizes: []Size{{64, 32}, {17, 90}}, Extra: []string{"temperature=0.5"},
	}
	bodies, err := s.bodies(t.Context(), "m", 1, 200)
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.bodies(t.Context(), "m", 1, 300)
	if err != nil {
		t.Fatal(err)
	}
	counts, sizes, urls := map[int]int{}, map[[2]int]int{}, map[string]int{}
	for i, body := range bodies {
		if !bytes.Equal(body, again[i]) {
			t.Fatalf("request %d depends on more than seed and number", i)
		}
		// The official client's own types read it back.
		var p openai.ChatCompletionNewParams
		if err := json.Unmarshal(body, &p); err != nil {
			t.Fatal(err)
		}
		if n := p.MaxTokens.Value; n < 10 || n > 20 || p.Model != "m" || p.Temperature.Value != 0.5 || !p.StreamOptions.IncludeUsage.Value {
			t.Fatalf("request %d: %s", i, body)
		}
		parts := p.Messages[0].OfUser.Content.OfArrayOfContentParts
		question := parts[len(parts)-1].OfText.Text
		if n := len(strings.Fields(question)); n < 3 || n > 5 {
			t.Errorf("a question of %d words: %s", n, question)
		}
		counts[len(parts)-1]++
		for _, part := range parts[:len(parts)-1] {
			url := part.OfImageURL.ImageURL.URL
			urls[url]++
			data, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(url, "data:image/png;base64,"))
			if err != nil {
				t.Fatal(err)
			}
			img, err := png.Decode(bytes.NewReader(data))
			if err != nil {
				t.Fatal(err)
			}
			sizes[[2]int{img.Bounds().Dx(), img.Bounds().Dy()}]++
		}
	}
	if len(counts) != 4 || len(sizes) != 2 || sizes[[2]int{64, 32}] == 0 || sizes[[2]int{17, 90}] == 0 {
		t.Errorf("pictures in requests: %v, of sizes %v", counts, sizes)
	}
	for _, n := range urls {
		if n > 1 {
			t.Error("a picture came twice")
			break
		}
	}
}

func TestRepeatedPictures(t *testing.T) {
	s := Shape{Question: "What?", Output: Span{1, 1}, Pictures: Span{2, 2}, Sizes: []Size{{32, 32}}, Repeat: 1}
	bodies, err := s.bodies(t.Context(), "m", 3, 100)
	if err != nil {
		t.Fatal(err)
	}
	different := map[string]bool{}
	for _, b := range bodies {
		for _, p := range strings.Split(string(b), "base64,")[1:] {
			url, _, _ := strings.Cut(p, `"`)
			different[url] = true
		}
	}
	if len(different) != popular {
		t.Errorf("%d different pictures, want %d", len(different), popular)
	}
}

func TestSpansAndSizes(t *testing.T) {
	for text, want := range map[string]Span{"3": {3, 3}, "0-16": {0, 16}} {
		var s Span
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want {
			t.Errorf("%s: %v, %v", text, s, err)
		}
		if back, _ := s.MarshalText(); string(back) != text {
			t.Errorf("%v is written %s", s, back)
		}
	}
	for _, text := range []string{"", "-1", "5-3", "a", "1-", "-", "1-2-3"} {
		if new(Span).UnmarshalText([]byte(text)) == nil {
			t.Errorf("span %q was taken", text)
		}
	}
	for _, text := range []string{"", "10", "0x5", "5x", "-1x5", "100000x1", "2x3x4"} {
		if new(Size).UnmarshalText([]byte(text)) == nil {
			t.Errorf("size %q was taken", text)
		}
	}
}

// Requests begin with one of a few system messages, all of which occur.
func TestPrefixes(t *testing.T) {
	s := Shape{Words: Span{3, 5}, Output: Span{10, 20}, Prefixes: 3, Prefix: 40}
	if err := s.Validate(); err != nil {
		t.Fatal(err)
	}
	bodies, err := s.bodies(t.Context(), "m", 1, 60)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, body := range bodies {
		var p openai.ChatCompletionNewParams
		if err := json.Unmarshal(body, &p); err != nil {
			t.Fatal(err)
		}
		system := p.Messages[0].OfSystem.Content.OfString.Value
		if n := len(strings.Fields(system)); n != 40 {
			t.Fatalf("a system message of %d words", n)
		}
		seen[system]++
	}
	if len(seen) != 3 {
		t.Errorf("%d system messages", len(seen))
	}
	for _, bad := range []Shape{{Prefixes: 3}, {Prefix: 3}, {Prefixes: 1, Prefix: 3, System: "x"}, {Prefixes: -1, Prefix: 3}} {
		bad.Words, bad.Output = s.Words, s.Output
		if bad.Validate() == nil {
			t.Errorf("%+v is taken", bad)
		}
	}
}
