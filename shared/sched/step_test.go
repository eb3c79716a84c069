package sched_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cockroachdb/datadriven"
	"pgregory.net/rapid"

	"trireme.dev/shared/model"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/placement"
)

// TestTraces replays the scripts in testdata: each command and what the scheduler makes of it. After a change that is meant
// to show there, go test ./shared/sched -rewrite writes them anew; read the difference.
func TestTraces(t *testing.T) {
	datadriven.Walk(t, "testdata/step", func(t *testing.T, path string) {
		w := &world{}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string { return w.do(t, d) })
	})
}

// world is the sequences of a script.
type world struct {
	limits sched.Limits
	npus   int
	step   sched.Step
	seqs   []*seq
	steps  int
}

// seq is one sequence: its prompt is computed up to pos; then it decodes until it has end tokens.
type seq struct {
	name             string
	npu              int
	pos, prompt, end int
}

func (w *world) do(t *testing.T, d *datadriven.TestData) string {
	switch d.Cmd {
	case "limits": // seqs=N rows=N [prompt=N] [tokens=N] [blocks=N] [least=N] [npus=N]: of all steps from now on
		w.limits, w.npus = sched.Limits{}, 1
		for name, to := range map[string]*int{
			"npus": &w.npus, "seqs": &w.limits.Seqs, "rows": &w.limits.Rows, "prompt": &w.limits.Prompt,
			"tokens": &w.limits.Tokens, "blocks": &w.limits.Blocks, "least": &w.limits.Least,
		} {
			d.MaybeScanArgs(t, name, to)
		}
		w.step = sched.NewStep(w.limits, placement.First(w.npus))
		return ""
	case "add": // a line each: NAME prompt=N answer=N [at=N] [npu=N]: a sequence of which at tokens are computed
		for _, line := range strings.Split(d.Input, "\n") {
			s := &seq{}
			for i, field := range strings.Fields(line) {
				name, value, ok := strings.Cut(field, "=")
				var n int
				if ok {
					if _, err := fmt.Sscan(value, &n); err != nil {
						d.Fatalf(t, "%s: %v", field, err)
					}
				}
				switch {
				case i == 0 && !ok:
					s.name = field
				case name == "prompt":
					s.prompt = n
				case name == "answer":
					s.end = n
				case name == "npu":
					s.npu = n
				case name == "at":
					s.pos = n
				default:
					d.Fatalf(t, "what is %s?", field)
				}
			}
			s.end += s.prompt
			w.seqs = append(w.seqs, s)
		}
		return ""
	case "run": // [steps=N]: steps until all is computed, or so many
		most := 1000
		d.MaybeScanArgs(t, "steps", &most)
		var out strings.Builder
		for ; most > 0 && len(w.seqs) > 0; most-- {
			line := w.next()
			if line == "" {
				out.WriteString("nothing can be computed\n")
				break
			}
			w.steps++
			fmt.Fprintf(&out, "%d:%s\n", w.steps, line)
		}
		return out.String()
	}
	d.Fatalf(t, "no command is called %s", d.Cmd)
	return ""
}

// next forms and computes one step and tells what was in it.
func (w *world) next() string {
	var line strings.Builder
	w.step.Begin()
	granted := map[*seq]int{}
	for _, s := range w.seqs {
		if s.pos >= s.prompt && w.step.Token(s.npu, s.pos) {
			granted[s] = 1
			fmt.Fprintf(&line, " %s@%d", s.name, s.pos)
		}
	}
	for _, s := range w.seqs {
		if s.pos < s.prompt {
			if n := w.step.Chunk(s.npu, s.pos, s.prompt-s.pos); n > 0 {
				granted[s] = n
				fmt.Fprintf(&line, " %s[%d,%d)", s.name, s.pos, s.pos+n)
			}
		}
	}
	keep := w.seqs[:0]
	for _, s := range w.seqs {
		if s.pos += granted[s]; s.pos < s.end {
			keep = append(keep, s)
		}
	}
	w.seqs = keep
	return line.String()
}

// Whatever asks for room, no step is over its limits, and a prompt that waits gets on in each.
func TestStepsKeepTheirLimits(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := sched.Limits{
			Seqs: rapid.IntRange(1, 20).Draw(t, "seqs"), Rows: rapid.IntRange(20, 200).Draw(t, "rows"),
			Prompt: rapid.IntRange(0, 100).Draw(t, "prompt tokens"),
			Mixed: sched.Mixed{
				Tokens: rapid.IntRange(0, 100).Draw(t, "tokens"), Blocks: rapid.IntRange(0, 300).Draw(t, "blocks"),
				Least: rapid.IntRange(1, 32).Draw(t, "least"),
			},
		}
		step := sched.NewStep(l, placement.First(1))
		for range 3 {
			step.Begin()
			decoding, prompt, seqs, blocks := 0, 0, 0, 0
			for range rapid.IntRange(0, 30).Draw(t, "decoding") {
				pos := rapid.IntRange(0, 500).Draw(t, "pos")
				if step.Token(0, pos) {
					decoding, seqs, blocks = decoding+1, seqs+1, blocks+pos/model.BlockTokens+1
				}
			}
			free := seqs < l.Seqs && decoding < l.Rows
			for i := range rapid.IntRange(0, 30).Draw(t, "prompts") {
				pos, left := rapid.IntRange(0, 500).Draw(t, "pos"), rapid.IntRange(1, 300).Draw(t, "left")
				n := step.Chunk(0, pos, left)
				if n < 0 || n > left {
					t.Fatalf("%d of %d tokens", n, left)
				}
				if i == 0 && free && n < min(left, l.Least, l.Rows-decoding) && (l.Prompt == 0 || n < l.Prompt) {
					t.Fatalf("the first prompt gets %d of %d tokens", n, left)
				}
				if n > 0 {
					seqs++
					prompt += n
				}
				for j := range n {
					blocks += (pos+j)/model.BlockTokens + 1
				}
			}
			if l.Prompt > 0 && prompt > l.Prompt {
				t.Fatalf("%d prompt tokens within %+v", prompt, l)
			}
			if seqs > l.Seqs || decoding+prompt > l.Rows || step.Tokens() != decoding+prompt {
				t.Fatalf("%d sequences, %d and %d tokens (it says %d) within %+v", seqs, decoding, prompt, step.Tokens(), l)
			}
			if decoding > 0 && prompt > l.Least {
				if l.Tokens > 0 && decoding+prompt > l.Tokens || l.Blocks > 0 && blocks > l.Blocks {
					t.Fatalf("%d tokens attending to %d blocks beside decoding, within %+v", decoding+prompt, blocks, l)
				}
			}
		}
	})
}

func TestFormingAllocatesNothing(t *testing.T) {
	step := sched.NewStep(sched.Limits{Seqs: 64, Rows: 512, Mixed: sched.Mixed{Tokens: 256, Blocks: 4096, Least: 16}}, placement.First(1))
	if n := testing.AllocsPerRun(100, func() {
		step.Begin()
		for pos := range 32 {
			step.Token(0, pos)
		}
		step.Chunk(0, 100, 1000)
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
