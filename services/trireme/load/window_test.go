package load

import (
	"errors"
	"testing"
	"time"
)

// Windows are counted against times written down by hand.
func TestWindows(t *testing.T) {
	t0 := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(ms int) time.Time { return t0.Add(time.Duration(ms) * time.Millisecond) }
	sample := func(sent, end int, err error, pieces ...int) Sample {
		s := Sample{Sent: at(sent), E2EL: at(end).Sub(at(sent)), Err: err}
		for _, p := range pieces {
			s.Pieces = append(s.Pieces, at(p))
		}
		if len(pieces) > 0 {
			s.TTFT = at(pieces[0]).Sub(at(sent))
		}
		return s
	}
	const ms = time.Millisecond
	r := &Report{Began: t0, Duration: time.Second, Samples: []Sample{
		sample(0, 500, nil, 100, 200, 490),
		sample(50, 260, nil, 90, 250),
		sample(300, 900, errors.New("broken"), 350),
		sample(700, 990, nil, 980),
	}}
	for _, c := range []struct {
		from, to int
		want     Window
	}{
		// The broken one waited from 350 to 900; the last one had its first piece too late.
		{0, 1000, Window{Pieces: 7, Gap: 550 * ms, Closed: 550 * ms, Ended: 4, Sent: 4, Good: 2, Failed: 1}},
		{0, 300, Window{Pieces: 4, Gap: 290 * ms, Closed: 160 * ms, Ended: 1, Sent: 2, Good: 2}}, // 200 to 490 reaches in
		{210, 260, Window{Pieces: 1, Gap: 290 * ms, Closed: 160 * ms}},
		{295, 960, Window{Pieces: 2, Gap: 550 * ms, Closed: 550 * ms, Ended: 2, Sent: 2, Failed: 1}},
		{950, 1000, Window{Pieces: 1, Ended: 1}},
	} {
		got := r.Between(at(c.from), at(c.to), Goodput{TTFT: 200})
		c.want.From, c.want.To = at(c.from), at(c.to)
		if got != c.want {
			t.Errorf("%d to %d ms: %+v, want %+v", c.from, c.to, got, c.want)
		}
	}
	if w := r.Between(at(0), at(500), Goodput{}); w.Rate() != float64(w.Pieces)/0.5 {
		t.Errorf("%g pieces a second of %d in half a second", w.Rate(), w.Pieces)
	}
	if got, want := r.Rates(500*time.Millisecond), []float64{12, 2, 0}; !equal(got, want) {
		t.Errorf("rates %v, want %v", got, want)
	}
	if got, want := r.Gaps(500*time.Millisecond), []float64{0.29, 0, 0}; !equal(got, want) {
		t.Errorf("gaps %v, want %v", got, want)
	}
}

func equal(a, b []float64) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if d := a[i] - b[i]; d > 1e-9 || d < -1e-9 {
			return false
		}
	}
	return true
}
