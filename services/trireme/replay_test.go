package main

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	"trireme.dev/shared/bus"
)

// A request that is made independent of what was there names its pictures' bytes and its seed, and is the same otherwise.
func TestSelfContained(t *testing.T) {
	const a, b = "\x89PNG\r\n\x1a\n first", "\xff\xd8\xff second"
	data := func(kind, s string) string {
		return "data:image/" + kind + ";base64," + base64.StdEncoding.EncodeToString([]byte(s))
	}
	for name, x := range map[string]struct {
		body     string
		pictures []string
		seed     int64
		want     string // "": the body as it is, byte by byte
	}{
		"nothing to do": {`{"prompt" : "x",  "seed":null}`, nil, 0, ""},
		"a seed":        {`{"prompt":"x","logit_bias":{"9007199254740993":1.50}}`, nil, -5, `{"prompt":"x","seed":-5,"logit_bias":{"9007199254740993":1.50}}`},
		"its own seed":  {`{"prompt":"x","seed":9223372036854775807}`, nil, 5, `{"prompt":"x","seed":9223372036854775807}`},
		"pictures": {
			`{"messages":[{"role":"system","content":"x"},{"content":[{"type":"text","text":"http://a"},{"image_url":{"url":"http://a","detail":"low"}},` +
				`{"image_url":"DATA:image/gif;base64,x"}]},{"content":[{"image_url":"https://b"},{"image_url":{"url":"http://a"}}]}],"tools":[{"url":"http://a"}]}`,
			[]string{a, b}, 0,
			`{"messages":[{"role":"system","content":"x"},{"content":[{"type":"text","text":"http://a"},{"image_url":{"url":"` + data("png", a) + `","detail":"low"}},` +
				`{"image_url":"DATA:image/gif;base64,x"}]},{"content":[{"image_url":"` + data("jpeg", b) + `"},{"image_url":{"url":"` + data("png", a) + `"}}]}],"tools":[{"url":"http://a"}]}`,
		},
	} {
		var pictures [][]byte
		for _, p := range x.pictures {
			pictures = append(pictures, []byte(p))
		}
		got, err := selfContained([]byte(x.body), pictures, x.seed)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if x.want == "" {
			if string(got) != x.body {
				t.Errorf("%s: %s", name, got)
			}
			continue
		}
		if g, w := parsed(t, got), parsed(t, []byte(x.want)); !reflect.DeepEqual(g, w) {
			t.Errorf("%s: %s\nwant %s", name, got, x.want)
		}
	}
	_, err := selfContained([]byte(`{"messages":[{"content":[{"image_url":"http://a"},{"image_url":"http://b"}]}]}`), [][]byte{[]byte(a)}, 0)
	if !errors.Is(err, bus.ErrNoRequest) {
		t.Errorf("with a picture too few: %v", err)
	}
}

func parsed(t *testing.T, body []byte) (v any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

// Streams of chats and of plain completions are printed as their text, other choices behind the first; an error in mid-stream is one.
func TestPrintStream(t *testing.T) {
	var out strings.Builder
	err := printStream(&out, "x", strings.NewReader(`data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}

data: {"choices":[{"index":0,"delta":{"content":"one "}},{"index":1,"delta":{"content":"other"}}]}

data: {"choices":[{"index":0,"text":"two"}]}

data: {"choices":[],"usage":{"total_tokens":3}}

data: [DONE]
`))
	if want := "one two\nchoice 1: other\n"; err != nil || out.String() != want {
		t.Errorf("%q, %v; want %q", &out, err, want)
	}
	err = printStream(&out, "letter7", strings.NewReader(`data: {"error":{"message":"it burns"}}`+"\n"))
	if err == nil || !strings.Contains(err.Error(), "it burns") || !strings.Contains(err.Error(), "letter7") {
		t.Errorf("an error in a stream: %v", err)
	}
}
