package chat

import (
	"os"
	"strings"
	"testing"
)

func BenchmarkRender(b *testing.B) {
	source, err := os.ReadFile("testdata/shapes.jinja")
	if err != nil {
		b.Fatal(err)
	}
	b.Run("shapes", func(b *testing.B) { benchmarkRender(b, parse(b, string(source)), 4) })
	b.Run("qwen3", func(b *testing.B) { benchmarkRender(b, qwen3(b), 4) })
	b.Run("qwen3, 64 turns", func(b *testing.B) { benchmarkRender(b, qwen3(b), 64) })
}

func benchmarkRender(b *testing.B, tpl *Template, turns int) {
	messages := []Message{text("system", "Be brief.")}
	for i := range turns {
		messages = append(messages, text([]string{"user", "assistant"}[i%2], strings.Repeat("What is in this picture? ", 20)))
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := tpl.Render(messages, Options{AddGenerationPrompt: true}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParse(b *testing.B) {
	source, err := os.ReadFile("testdata/shapes.jinja")
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		parse(b, string(source))
	}
}
