package stage

import (
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"pgregory.net/rapid"

	"trireme.dev/shared/engine/sample"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/wire"
)

// Logits that are no numbers are an error that says in which stage, and no token.
func TestDrawWithoutNumbers(t *testing.T) {
	nan, inf := float32(math.NaN()), float32(math.Inf(1))
	for name, x := range map[string]struct {
		logits   []float32
		logprobs int
		bad      bool
	}{
		"numbers":                  {[]float32{1, 2, 3}, -1, false},
		"numbers, logprobs":        {[]float32{1, 2, 3}, 2, false},
		"one impossible, logprobs": {[]float32{1, 2, -inf}, 3, false},
		"none":                     {[]float32{nan, nan, nan}, -1, true},
		"none, logprobs":           {[]float32{nan, nan, nan}, 0, true},
		"some, logprobs":           {[]float32{1, nan, 3}, 3, false}, // which are passed over
		"one beyond all, logprobs": {[]float32{1, inf, 3}, 1, true},
		"all impossible, logprobs": {[]float32{-inf, -inf, -inf}, 0, true},
	} {
		s := wire.Sampling{Logprobs: x.logprobs}
		rec, lp, err := Draw(Decode, sample.New(SampleParams(&s, 0), nil, nil, nil), &s, x.logits, 0)
		if !x.bad {
			if err != nil || x.logprobs >= 0 && (len(lp) != 1 || math.IsNaN(float64(lp[0].Own))) {
				t.Errorf("%s: %+v, %v, %v", name, rec, lp, err)
			}
			continue
		}
		if f := (*Fault)(nil); !errors.As(err, &f) || f.Status != 500 || f.Code != CodeNoNumbers || !strings.Contains(err.Error(), "in decode") {
			t.Errorf("%s: %+v, %v, %v", name, rec, lp, err)
		}
	}
}

// encoded is the size of a run inside a message.
func encoded(t *rapid.T, r wire.Run) int {
	one, err := wire.Marshal(&wire.Tokens{Items: []wire.Run{r}})
	if err != nil {
		t.Fatal(err)
	}
	none, err := wire.Marshal(&wire.Tokens{Items: []wire.Run{}})
	if err != nil {
		t.Fatal(err)
	}
	return len(one) - len(none)
}

// The size that messages are cut by is an upper bound of the real one, and no idle one.
func TestRunSizeIsABound(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		big := rapid.Bool().Draw(t, "big")
		id := func() int32 {
			if big {
				return math.MaxInt32
			}
			return rapid.Int32Min(0).Draw(t, "id")
		}
		r := wire.Run{
			Request: strings.Repeat("r", rapid.IntRange(1, 32).Draw(t, "name")), Attempt: 3, Choice: 127,
			Generation: math.MaxUint64, Index: 1 << 27, Finish: wire.FinishLength, Cached: 1 << 27, Computed: 1 << 27,
		}
		top := rapid.SampledFrom([]int{-1, 0, 1, 20, 64}).Draw(t, "top")
		for range rapid.IntRange(1, 60).Draw(t, "tokens") {
			r.IDs = append(r.IDs, id())
			if top < 0 {
				continue
			}
			lp := wire.Logprob{Own: -1.5}
			for range top {
				lp.IDs, lp.Top = append(lp.IDs, id()), append(lp.Top, -2.5)
			}
			r.Logprobs = append(r.Logprobs, lp)
		}
		size, bound := encoded(t, r), runSize(&r)
		if size > bound {
			t.Fatalf("a run of %d bytes is reckoned with %d", size, bound)
		}
		if big && bound > 2*size+96 {
			t.Fatalf("a run of %d bytes is reckoned with %d", size, bound)
		}
	})
}

// A log is read back in runs each of which fits a message, whatever is kept with each token, without a gap.
func TestReplayFitsMessages(t *testing.T) {
	for _, top := range []int{-1, 0, 20, 64} {
		shape := kv.LogShape{Request: strings.Repeat("r", 32), Choice: 1, Attempt: 2, Prompt: 1, MaxTokens: 9000, MaxSlabs: 50, Top: max(top, 0)}
		words := make([]uint64, shape.Bytes()/8+1)
		log, err := kv.CreateLog(unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), shape.Bytes()), shape, 1)
		if err != nil {
			t.Fatal(err)
		}
		ids, lps := slices.Repeat([]int32{1 << 20}, max(top, 0)), slices.Repeat([]float32{-1.5}, max(top, 0))
		for i := range shape.MaxTokens {
			if err := log.Append(kv.Record{Index: i, Token: 1<<20 + int32(i), Logprob: -1, TopIDs: ids, Top: lps}); err != nil {
				t.Fatal(err)
			}
		}
		s := &wire.Sampling{MaxTokens: shape.MaxTokens, Logprobs: top}
		runs, err := Replay(log, s, 7, 5)
		if err != nil {
			t.Fatal(err)
		}
		next := 5
		for i, r := range runs {
			if data, err := wire.Marshal(&wire.Tokens{Instance: "decode-12345678", Items: []wire.Run{r}}); err != nil {
				t.Fatalf("%d alternatives: run %d of %d tokens: %v", top, i, len(r.IDs), err)
			} else if i < len(runs)-1 && len(data) < wire.MaxMessage/2 {
				t.Errorf("%d alternatives: run %d of %d tokens has %d bytes only", top, i, len(r.IDs), len(data))
			}
			if r.Index != next || r.Generation != 7 || r.Attempt != 2 || r.Choice != 1 || r.Request != shape.Request || (top >= 0) != (len(r.Logprobs) == len(r.IDs)) {
				t.Fatalf("run %d: index %d, want %d, of %d tokens and %d log probabilities", i, r.Index, next, len(r.IDs), len(r.Logprobs))
			}
			for k, id := range r.IDs {
				if id != 1<<20+int32(next+k) || top > 0 && len(r.Logprobs[k].IDs) != top {
					t.Fatalf("token %d is %d", next+k, id)
				}
			}
			next += len(r.IDs)
			if last := next == shape.MaxTokens; last != (r.Finish == wire.FinishLength) || !last && r.Finish != wire.FinishNone {
				t.Errorf("run %d up to %d has finish %d", i, next, r.Finish)
			}
		}
		if next != shape.MaxTokens {
			t.Errorf("runs end at %d", next)
		}
	}
}

func TestFinishOf(t *testing.T) {
	s := &wire.Sampling{MaxTokens: 5, MinTokens: 2, Stop: []int32{7, 9}}
	for _, x := range []struct {
		index int
		token int32
		want  wire.Finish
	}{
		{0, 1, wire.FinishNone}, {0, 7, wire.FinishNone}, {1, 9, wire.FinishNone}, {2, 7, wire.FinishStop}, {3, 9, wire.FinishStop},
		{3, 8, wire.FinishNone}, {4, 8, wire.FinishLength}, {4, 9, wire.FinishStop}, {5, 8, wire.FinishLength},
	} {
		if got := FinishOf(s, x.index, x.token); got != x.want {
			t.Errorf("token %d at %d: %d, want %d", x.token, x.index, got, x.want)
		}
	}
}
