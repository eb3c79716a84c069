package openai

import (
	"encoding/base64"
	"testing"
)

// BenchmarkChunk is the cost of the event of one token.
func BenchmarkChunk(b *testing.B) {
	c := NewChunks(true, "chatcmpl-0123456789ABCDEFGHIJKL", "model", 1, true)
	k := &Chunk{Text: " word"}
	var buf []byte
	b.ReportAllocs()
	for b.Loop() {
		var err error
		if buf, err = c.Append(buf[:0], k); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(int64(len(buf)))
}

// BenchmarkDecodeChat is the cost of a request with a picture of 1 MB in it.
func BenchmarkDecodeChat(b *testing.B) {
	picture := base64.StdEncoding.EncodeToString(make([]byte, 1<<20))
	body := []byte(`{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"what?"},` +
		`{"type":"image_url","image_url":{"url":"data:image/png;base64,` + picture + `"}}]}]}`)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := DecodeChat(body); err != nil {
			b.Fatal(err)
		}
	}
}
