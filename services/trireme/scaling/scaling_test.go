package scaling_test

import (
	"errors"
	"testing"
	"time"

	"pgregory.net/rapid"

	"trireme.dev/services/trireme/load"
	"trireme.dev/services/trireme/scaling"
)

var t0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func at(ms int) time.Time { return t0.Add(time.Duration(ms) * time.Millisecond) }

func sample(number, sent, end int, said uint64, err error, pieces ...int) load.Sample {
	s := load.Sample{Number: number, Sent: at(sent), E2EL: at(end).Sub(at(sent)), Said: said, Err: err}
	for _, p := range pieces {
		s.Pieces = append(s.Pieces, at(p))
	}
	if len(pieces) > 0 {
		s.TTFT = at(pieces[0]).Sub(at(sent))
	}
	return s
}

// The longest silence is what a count millisecond by millisecond finds.
func TestSilence(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		const end = 60
		ms := func(from int, name string) int { return rapid.IntRange(from, end).Draw(r, name) }
		report := &load.Report{Began: t0}
		came, open := [end + 1]bool{}, [end + 1]bool{} // open[i]: somebody waits all of [i, i+1)
		for i := range rapid.IntRange(0, 4).Draw(r, "requests") {
			sent := ms(0, "sent")
			last := ms(sent, "end")
			var pieces []int
			for p := sent; p < last; {
				if p = ms(p+1, "piece"); p > last {
					break
				}
				pieces = append(pieces, p)
				came[p] = true
			}
			report.Samples = append(report.Samples, sample(i, sent, last, 0, nil, pieces...))
			for m := sent; m < last; m++ {
				open[m] = true
			}
		}
		from := ms(0, "from")
		to := ms(from, "to")
		want, now := 0, 0
		for m := from; m < to; m++ {
			if came[m] || !open[m] {
				now = 0
			}
			if open[m] {
				now++
				want = max(want, now)
			}
		}
		if got := scaling.Silence(report, at(from), at(to)); got != time.Duration(want)*time.Millisecond {
			r.Fatalf("silence of %v in [%d, %d), by counting %d ms", got, from, to, want)
		}
	})
}

func TestMeasure(t *testing.T) {
	r := &load.Report{Began: t0, Duration: 13 * time.Second, Failed: 1, Samples: []load.Sample{
		sample(0, 0, 3000, 7, nil, 500, 1000, 1500, 2000, 2500, 3000),
		sample(1, 2500, 7000, 8, nil, 3000, 3500, 6500, 7000), // a gap of 3 s
		sample(2, 4000, 6000, 0, errors.New("refused")),
		sample(3, 7500, 9000, 9, nil, 8000, 8500, 9000),
		sample(4, 12000, 13000, 0, nil, 13000),
	}}
	memory := []scaling.Memory{{at(0), 400}, {at(1000), 120}, {at(2900), 110}, {at(4000), 300}, {at(5000), 240}, {at(8000), 150}, {at(12500), 10}}
	e := scaling.Event{Steady: at(1000), Command: at(3000), Full: at(7000), Moved: 50, Warm: 20 * time.Millisecond}
	f := scaling.Measure(r, e, load.Goodput{TTFT: 1000}, memory, map[int]uint64{0: 7, 1: 1, 2: 5, 3: 9})
	if f.Latency != 4 || f.Downtime != 3 || f.Moved != 50 || f.Warm != 0.02 {
		t.Errorf("latency %g, downtime %g, %d moved, warm in %g; want 4, 3, 50, 0.02", f.Latency, f.Downtime, f.Moved, f.Warm)
	}
	if f.Held != 120 || f.Peak != 300 || f.Settled != 150 {
		t.Errorf("memory %d, %d, %d, want 120, 300, 150", f.Held, f.Peak, f.Settled)
	}
	if f.Sent != 5 || f.Failed != 1 || f.Changed != 1 {
		t.Errorf("%d requests, %d failed, %d changed, want 5, 1, 1: what failed has no answer to compare", f.Sent, f.Failed, f.Changed)
	}
	if p := f.Before; p.Seconds != 2 || p.Gap != 0.5 || p.Rate != 2 {
		t.Errorf("before: %+v, want 4 tokens and a gap of 0.5 s in the 2 s in which the load was steady", p)
	}
	if p := f.During; p.Seconds != 4 || p.Gap != 3 || p.Rate != 1 || p.Attainment != 0 {
		t.Errorf("during: %+v, want 4 tokens in 4 s, a gap of 3 s, none good of the one that was sent", p)
	}
	if p := f.After; p.Seconds != 4 || p.Requests != 0.5 || p.Attainment != 1 {
		t.Errorf("after: %+v, want 4 s as well, in which two ended and one was sent", p)
	}
}

// Answers without text have not failed if they have none without the change either; others have lost theirs.
func TestEmptyAnswers(t *testing.T) {
	r := &load.Report{Began: t0, Duration: time.Second, Failed: 3, Samples: []load.Sample{
		sample(0, 0, 100, 0, load.ErrEmpty), sample(1, 0, 100, 0, load.ErrEmpty), sample(2, 0, 100, 0, errors.New("refused")), sample(3, 0, 100, 5, nil, 50),
	}}
	f := scaling.Measure(r, scaling.Event{Command: at(50), Full: at(60)}, load.Goodput{}, nil, map[int]uint64{0: 0, 1: 7, 2: 7, 3: 5})
	if f.Failed != 2 || f.Changed != 1 {
		t.Errorf("%d failed, %d changed; want 2 and 1", f.Failed, f.Changed)
	}
}

// A change that is over at once is measured over a time in which there is something to measure, and so is what it is compared with; no time
// goes beyond the load.
func TestShortChange(t *testing.T) {
	r := &load.Report{Began: t0, Duration: 10 * time.Second, Samples: []load.Sample{
		sample(0, 0, 9000, 0, nil, 1000, 2000, 3000, 4000, 5000, 6000, 9000), sample(1, 7500, 8000, 0, nil, 8000),
	}}
	f := scaling.Measure(r, scaling.Event{Command: at(4500), Full: at(4510), Window: 2 * time.Second}, load.Goodput{}, nil, nil)
	if f.Latency != 0.01 || f.During.Seconds != 2 || f.Before.Seconds != 2 || f.After.Seconds != 1 {
		t.Errorf("%+v: want a latency of 0.01 s, and parts of 2 s, the last of 1", f)
	}
}
