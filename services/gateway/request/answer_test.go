package request

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"trireme.dev/shared/wire"
)

// pieces is a TextStream whose token i is the i-th string.
type pieces []string

func (p pieces) Push(id int) string { return p[id] }
func (p pieces) Flush() string      { return "" }

// halves is a TextStream with one character of two tokens: 0 gives nothing, 1 completes it.
type halves struct{ open bool }

func (h *halves) Push(id int) string {
	h.open = id == 0
	if h.open {
		return ""
	}
	return "é"
}

func (h *halves) Flush() string {
	if h.open {
		return "\uFFFD"
	}
	return ""
}

// collector gathers what a client gets.
type collector struct {
	text   []string
	reason []Reason
	last   []Piece
}

func collect(choices int) *collector {
	return &collector{text: make([]string, choices), reason: make([]Reason, choices), last: make([]Piece, choices)}
}

func (c *collector) emit(p *Piece) {
	c.text[p.Choice] += p.Text
	c.reason[p.Choice] = p.Reason
	c.last[p.Choice] = *p
}

func run(index int, ids ...int32) *wire.Run {
	return &wire.Run{Attempt: 1, Index: index, IDs: ids, Generation: 1}
}

func TestStopStringsAcrossTokens(t *testing.T) {
	for _, test := range []struct {
		name   string
		tokens string // separated by |
		stop   []string
		min    int
		keep   bool
		text   string
		word   string
		count  int
	}{
		{name: "no stop", tokens: "a|b|c", text: "abc", count: 3},
		{name: "in one token", tokens: "ab|xSTOPy|c", stop: []string{"STOP"}, text: "abx", word: "STOP", count: 2},
		{name: "across three", tokens: "aS|T|OPb|c", stop: []string{"STOP"}, text: "a", word: "STOP", count: 3},
		{name: "included", tokens: "aS|T|OPb|c", stop: []string{"STOP"}, keep: true, text: "aSTOP", word: "STOP", count: 3},
		{name: "beginning that is none", tokens: "aS|TO|x|c", stop: []string{"STOP"}, text: "aSTOxc", count: 4},
		{name: "beginning at the end", tokens: "a|ST", stop: []string{"STOP"}, text: "aST", count: 2},
		{name: "overlap with itself", tokens: "a|aab|x", stop: []string{"aab"}, text: "a", word: "aab", count: 2},
		{name: "first end wins", tokens: "xabc", stop: []string{"abc", "b"}, text: "xa", word: "b", count: 1},
		{name: "longest of one end", tokens: "xabc", stop: []string{"c", "abc"}, text: "x", word: "abc", count: 1},
		{name: "several words", tokens: "a\n|\nb", stop: []string{"zz", "\n\n"}, text: "a", word: "\n\n", count: 2},
		{name: "not before min tokens", tokens: "b|b|b|b", stop: []string{"b"}, min: 2, text: "bb", word: "b", count: 3},
		{name: "multibyte", tokens: "aé|ö|x", stop: []string{"éö"}, text: "a", word: "éö", count: 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			words := strings.Split(test.tokens, "|")
			a := New(Config{Choices: 1, Stop: test.stop, MinTokens: test.min, IncludeStop: test.keep},
				func() TextStream { return pieces(words) })
			got := collect(1)
			for i := range words {
				r := run(i, int32(i))
				if i == len(words)-1 {
					r.Finish = wire.FinishLength
				}
				a.Take("d", r, got.emit)
			}
			if !a.Done() {
				t.Fatal("not done")
			}
			want := ReasonLength
			if test.word != "" {
				want = ReasonStop
			}
			if got.text[0] != test.text || got.last[0].Word != test.word || got.reason[0] != want || a.Generated() != test.count {
				t.Errorf("got %q, stop %q, %v, %d tokens; want %q, %q, %v, %d", got.text[0], got.last[0].Word, got.reason[0],
					a.Generated(), test.text, test.word, want, test.count)
			}
		})
	}
}

// TestStopsDoNotDependOnCuts compares pieces cut anywhere with the plain definition over the whole text.
func TestStopsDoNotDependOnCuts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		words := rapid.SliceOfN(rapid.StringMatching(`[ab]{1,4}`), 1, 3).Draw(t, "stops")
		text := rapid.StringMatching(`[abc]{0,24}`).Draw(t, "text")
		want := text
	search:
		for end := 1; end <= len(text); end++ {
			best := -1
			for _, w := range words {
				if strings.HasSuffix(text[:end], w) {
					best = max(best, len(w))
				}
			}
			if best >= 0 {
				want = text[:end-best]
				break search
			}
		}
		s := stops{words: words}
		got, rest := "", text
		stopped := false
		for len(rest) > 0 && !stopped {
			n := rapid.IntRange(1, len(rest)).Draw(t, "cut")
			out, found := s.push(rest[:n])
			got, rest = got+out, rest[n:]
			if found != nil {
				got, stopped = got+found.text, true
			}
		}
		if got += s.flush(); got != want {
			t.Fatalf("%q with %q: got %q, want %q", text, words, got, want)
		}
	})
}

func TestCharacterSplitOverTokens(t *testing.T) {
	a := New(Config{Choices: 1}, func() TextStream { return &halves{} })
	got := collect(1)
	a.Take("d", run(0, 0), got.emit)
	if got.text[0] != "" {
		t.Fatalf("half a character gave %q", got.text[0])
	}
	a.Take("d", run(1, 1), got.emit)
	a.Take("d", &wire.Run{Attempt: 1, Index: 2, IDs: []int32{0}, Finish: wire.FinishLength, Generation: 1}, got.emit)
	if got.text[0] != "é\uFFFD" {
		t.Fatalf("got %q", got.text[0])
	}
}

func TestGapsDuplicatesAndFences(t *testing.T) {
	words := pieces(strings.Split("a|b|c|d|e|f|g|h", "|"))
	a := New(Config{Choices: 1}, func() TextStream { return words })
	got := collect(1)
	take := func(generation uint64, index int, ids ...int32) {
		r := run(index, ids...)
		r.Generation = generation
		a.Take("d1", r, got.emit)
	}
	take(0, 0, 0) // the prefill's
	take(1, 2, 2)
	if from, sender, ok := a.Gap(0); !ok || from != 1 || sender != "d1" {
		t.Fatalf("gap: %d %q %v", from, sender, ok)
	}
	take(1, 0, 0, 1, 2) // the resend, from further back than needed
	if _, _, ok := a.Gap(0); ok {
		t.Fatal("gap is filled, but still there")
	}
	take(1, 1, 1) // a duplicate
	take(2, 3, 3) // a successor
	take(1, 4, 7) // the fenced one goes on
	take(0, 0, 0) // a prefill that was redelivered
	if got.text[0] != "abcd" {
		t.Fatalf("got %q", got.text[0])
	}
	if _, _, ok := a.Gap(0); ok {
		t.Fatal("a fenced writer made a gap")
	}
	if c := a.Confirm(&wire.Confirm{Attempt: 1, Generation: 2, Next: 6, Finish: wire.FinishStop}, got.emit); c.Over || c.Next != 4 {
		t.Fatalf("confirm with tokens missing: %+v", c)
	}
	a.Take("d2", &wire.Run{Attempt: 1, Index: 3, IDs: []int32{3, 4, 5}, Generation: 2, Finish: wire.FinishStop}, got.emit)
	if got.text[0] != "abcde" || got.last[0].StopID != 5 || !a.Done() || a.Generated() != 6 {
		t.Fatalf("end: %q %+v", got.text[0], got.last[0])
	}
	if !a.Owed() {
		t.Fatal("nobody is owed a confirmation of the end")
	}
	if c := a.Confirm(&wire.Confirm{Attempt: 1, Generation: 2, Next: 6, Finish: wire.FinishStop}, got.emit); !c.Over || c.Next != 6 {
		t.Fatalf("confirm after the end: %+v", c)
	}
	if a.Owed() {
		t.Fatal("a confirmation is still owed")
	}
}

func TestRestartGoesOn(t *testing.T) {
	words := pieces(strings.Split("a|b|c|d", "|"))
	a := New(Config{Choices: 2, Stop: []string{"bc"}}, func() TextStream { return words })
	got := collect(2)
	a.Take("d", run(0, 0, 1), got.emit)
	a.Take("d", &wire.Run{Attempt: 1, Choice: 1, IDs: []int32{3}, Generation: 9, Finish: wire.FinishLength}, got.emit)
	if diff := cmp.Diff([][]int32{{0, 1}, {3}}, a.Restart()); diff != "" {
		t.Fatal(diff)
	}
	a.Take("d", run(2, 3), got.emit) // of the old attempt
	if a.Tokens(0) != 2 {
		t.Fatal("took a token of an old attempt")
	}
	if c := a.Confirm(&wire.Confirm{Attempt: 1, Next: 3}, got.emit); !c.Over {
		t.Fatal("an old attempt's decoder was told to go on")
	}
	a.Take("p", &wire.Run{Attempt: 2, Index: 2, IDs: []int32{2}, Generation: 1, Computed: 5, Cached: 3}, got.emit)
	if !a.Done() || got.text[0] != "a" || got.last[0].Word != "bc" || got.text[1] != "d" || got.reason[1] != ReasonLength {
		t.Fatalf("got %q %+v, %q", got.text[0], got.last[0], got.text[1])
	}
	if cached, computed := a.Prompt(); cached != 3 || computed != 5 {
		t.Fatalf("prompt: %d %d", cached, computed)
	}
}

func TestLostEndComesWithConfirm(t *testing.T) {
	a := New(Config{Choices: 1, Stop: []string{"ax"}}, func() TextStream { return pieces{"a"} })
	got := collect(1)
	a.Take("d", run(0, 0), got.emit)
	if got.text[0] != "" {
		t.Fatalf("gave out %q, which could begin a stop string", got.text[0])
	}
	c := a.Confirm(&wire.Confirm{Attempt: 1, Generation: 1, Next: 1, Finish: wire.FinishLength}, got.emit)
	if !c.Over || got.text[0] != "a" || got.reason[0] != ReasonLength {
		t.Fatalf("%+v %q %v", c, got.text[0], got.reason[0])
	}
}

func TestStopIDLeavesNoTextUnlessAsked(t *testing.T) {
	for _, keep := range []bool{false, true} {
		a := New(Config{Choices: 1, IncludeStop: keep}, func() TextStream { return pieces{"a", "."} })
		got := collect(1)
		a.Take("d", &wire.Run{Attempt: 1, IDs: []int32{0, 1}, Finish: wire.FinishStop}, got.emit)
		want := "a"
		if keep {
			want = "a."
		}
		if got.text[0] != want || got.last[0].StopID != 1 || a.Generated() != 2 {
			t.Errorf("include %v: got %q %+v", keep, got.text[0], got.last[0])
		}
	}
}

// TestAnyDeliveryGivesTheSameAnswer feeds runs lost, repeated and out of order, resending from every gap, and expects
// the answer that an undisturbed stream gives.
func TestAnyDeliveryGivesTheSameAnswer(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 30).Draw(t, "tokens")
		words := make(pieces, n)
		for i := range words {
			words[i] = rapid.StringMatching(`[ab ]{0,2}`).Draw(t, "word")
		}
		cfg := Config{Choices: 1, Stop: []string{"aab", "b b"}, MinTokens: rapid.IntRange(0, 3).Draw(t, "min")}
		piece := func(from, to int) *wire.Run {
			r := &wire.Run{Attempt: 1, Index: from, Generation: 1}
			for i := from; i < to; i++ {
				r.IDs = append(r.IDs, int32(i))
			}
			if to == n {
				r.Finish = wire.FinishLength
			}
			return r
		}
		want := collect(1)
		whole := New(cfg, func() TextStream { return words })
		whole.Take("d", piece(0, n), want.emit)

		got := collect(1)
		a := New(cfg, func() TextStream { return words })
		for !a.Done() {
			from := rapid.IntRange(0, n-1).Draw(t, "from")
			a.Take("d", piece(from, rapid.IntRange(from+1, n).Draw(t, "to")), got.emit)
			if at, _, ok := a.Gap(0); ok {
				a.Take("d", piece(at, n), got.emit)
			}
		}
		if got.text[0] != want.text[0] || got.reason[0] != want.reason[0] || a.Generated() != whole.Generated() {
			t.Fatalf("got %q %d, want %q %d", got.text[0], a.Generated(), want.text[0], whole.Generated())
		}
	})
}

// A decoder of another node goes on although its claim has a lower number: each node's HMM counts by itself, from when it was
// started. On one node a lower number is an older claim.
func TestSuccessorOnAnotherNode(t *testing.T) {
	nodes := map[string]string{"d1": "a", "d2": "a", "d3": "b"}
	a := New(Config{Choices: 1, Apart: func(x, y string) bool { return nodes[x] != nodes[y] }},
		func() TextStream { return pieces{"a", "b", "c", "d"} })
	got := collect(1)
	take := func(instance string, generation uint64, index int) {
		a.Take(instance, &wire.Run{Attempt: 1, Index: index, IDs: []int32{int32(index)}, Generation: generation}, got.emit)
	}
	take("d2", 900, 0)
	take("d1", 800, 1) // taken over by d2 before
	if got.text[0] != "a" {
		t.Errorf("%q with tokens of a claim that was lost", got.text[0])
	}
	take("d3", 50, 1)
	take("d3", 50, 2)
	if got.text[0] != "abc" {
		t.Errorf("%q, the successor on another node is not heard", got.text[0])
	}
	c := a.Confirm(&wire.Confirm{Instance: "d3", Attempt: 1, Generation: 50, Next: 3, Finish: wire.FinishLength}, got.emit)
	if c.Next != 3 || got.reason[0] != ReasonLength {
		t.Errorf("its end counts as %+v, %v", c, got.reason[0])
	}
}
