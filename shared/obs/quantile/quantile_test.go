package quantile_test

import (
	"math"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"trireme.dev/shared/obs/quantile"
)

var durations = rapid.SliceOfN(rapid.Custom(func(t *rapid.T) time.Duration {
	return time.Duration(rapid.Int64Range(int64(10*time.Microsecond), int64(time.Hour)).Draw(t, "duration"))
}), 1, 300)

// A sketch that was put together of two, of which one was sent, has the quantiles and shares that the durations themselves have.
func TestAgainstAllDurations(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := durations.Draw(t, "durations")
		cut := rapid.IntRange(0, len(all)).Draw(t, "cut")
		var a, b quantile.Sketch
		for i, d := range all {
			if i < cut {
				a.Add(d)
			} else {
				b.Add(d)
			}
		}
		sent, err := quantile.Decode(b.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		a.Merge(&sent)
		if a.Count() != len(all) {
			t.Fatalf("%d durations, want %d", a.Count(), len(all))
		}
		slices.Sort(all)
		q := rapid.Float64Range(0, 1).Draw(t, "q")
		got, want := a.Quantile(q), all[int(q*float64(len(all)-1))]
		if math.Abs(float64(got-want)) > 0.0201*float64(want) {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
		bound := all[rapid.IntRange(0, len(all)-1).Draw(t, "bound")]
		low, high := 0, 0 // what is within 5% of the bound may be on either side of it
		for _, d := range all {
			if float64(d) <= 0.95*float64(bound) {
				low++
			}
			if float64(d) <= 1.05*float64(bound) {
				high++
			}
		}
		share := a.Within(bound) * float64(len(all))
		if share < float64(low)-0.5 || share > float64(high)+0.5 {
			t.Errorf("%v of %d are within %v, want %d to %d", share, len(all), bound, low, high)
		}
	})
}

func TestEmpty(t *testing.T) {
	var s, o quantile.Sketch
	s.Merge(&o)
	if s.Count() != 0 || s.Quantile(0.5) != 0 || s.Within(0) != 1 || s.Bytes() != nil {
		t.Error("an empty sketch is not empty")
	}
	if got, err := quantile.Decode(nil); err != nil || got.Count() != 0 {
		t.Errorf("nothing decodes as %d durations, %v", got.Count(), err)
	}
	for _, bad := range [][]byte{{1}, {255, 255}, []byte("no sketch at all")} {
		if s, err := quantile.Decode(bad); err == nil && s.Count() > 0 {
			t.Errorf("%v decodes as %d durations", bad, s.Count())
		}
	}
}

// What a window says lies between what has happened within its length and within its length and a part, whatever the times.
func TestWindowForgets(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const length = time.Minute
		w := quantile.NewWindow(length)
		now := time.Unix(1_000_000, 0)
		var times []time.Time
		for range rapid.IntRange(1, 100).Draw(t, "durations") {
			now = now.Add(time.Duration(rapid.Int64Range(0, int64(20*time.Second)).Draw(t, "later")))
			w.Add(now, time.Second, 2*time.Second)
			w.Miss(now)
			times = append(times, now)
		}
		now = now.Add(time.Duration(rapid.Int64Range(0, int64(2*time.Minute)).Draw(t, "read")))
		low, high := 0, 0
		for _, x := range times {
			if now.Sub(x) < length*11/12 {
				low++
			}
			if now.Sub(x) <= length {
				high++
			}
		}
		s, c := w.Read(now)
		n := s.Count()
		if all := uint64(n); n < low || n > high || c != (quantile.Counts{Judged: all, Met: all, Missed: all}) {
			t.Errorf("%d durations (%+v), want %d to %d", n, c, low, high)
		}
	})
}

func TestAddAllocatesNothing(t *testing.T) {
	w := quantile.NewWindow(time.Minute)
	now := time.Unix(1_000_000, 0)
	add := func() {
		for d := time.Millisecond; d < 10*time.Second; d = d * 5 / 4 {
			w.Add(now, d, time.Second)
		}
	}
	add()
	if n := testing.AllocsPerRun(100, add); n > 0 {
		t.Errorf("%v allocations for durations as they came before", n)
	}
}
