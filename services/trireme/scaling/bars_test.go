package scaling_test

import (
	"math"
	"testing"

	"trireme.dev/services/trireme/scaling"
)

// run is one at 100 bytes a second.
func run(strategy string, latency, gap, rate float64, peak int64) scaling.Figures {
	return scaling.Figures{
		Strategy: strategy, CopyRate: 100, Latency: latency, Moved: 50, Warm: 0.05, Held: 1000, Settled: 900, Peak: peak, Sent: 10,
		Before: scaling.Part{Gap: 0.1, Rate: 50}, During: scaling.Part{Gap: gap, Rate: rate},
	}
}

// Bars are of elastic at one copy rate, of the middle run or the worst one, beside the best other way.
func TestBars(t *testing.T) {
	other := run(scaling.Elastic, 9, 9, 1, 9000)
	other.CopyRate = 50
	all := []scaling.Figures{
		run(scaling.Elastic, 0.7, 0.2, 50, 1060), run("cold", 9, 5, 1, 2000), run("horizontal", 7, 0.1, 50, 5000), other, run("no-copy", 0.1, 1, 1, 1),
		run(scaling.Elastic, 0.9, 0.5, 10, 1061), run("horizontal", 5, 0.1, 50, 5000), run(scaling.Elastic, 0.8, 0.1, 48, 1000), run("horizontal", 8, 0.1, 50, 5000),
	}
	check := func(kept ...bool) {
		t.Helper()
		measured := []float64{2, 48.0 / 50, 0.8, 1061.0 / (1 << 20), 0, 7 / 0.8}
		bound := []float64{2, 0.95, 1.3*0.5 + 0.05 + 0.1, 1060.0 / (1 << 20), 0, 9}
		speed, ok := scaling.Speed(all)
		bars := append(scaling.Bars(all, 100, true), speed)
		if !ok || len(bars) != len(measured) {
			t.Fatalf("%d bars, want %d", len(bars), len(measured))
		}
		for i, b := range bars {
			if math.Abs(b.Measured-measured[i]) > 1e-9 || math.Abs(b.Bound-bound[i]) > 1e-9 || b.Kept != kept[i] || b.Runs != 3 {
				t.Errorf("%+v; want %g of %g, kept: %v", b, measured[i], bound[i], kept[i])
			}
		}
	}
	check(true, true, true, false, true, false)
	for i := range all { // the same longer, and smaller
		if all[i].Strategy == "horizontal" {
			all[i].Latency += 0.2
		}
	}
	if b, ok := scaling.Speed(all); !ok || !b.Kept {
		t.Errorf("%+v; want 9 times and kept", b)
	}
	all[0].Changed, all[5].Failed, all[5].Before.Gap = 1, 1, 0
	if b := scaling.Bars(all, 100, true); b[4].Kept || b[4].Measured != 2 {
		t.Errorf("%+v; want one changed and one lost, and the bar missed", b[4])
	}
	if b := scaling.Bars(all[1:3], 100, true); len(b) != 0 {
		t.Errorf("bars without runs of elastic: %+v", b)
	}
	for _, some := range [][]scaling.Figures{nil, all[1:3], all[:1]} {
		if b, ok := scaling.Speed(some); ok {
			t.Errorf("faster than others, of which there are none, or faster although it was not run: %+v", b)
		}
	}
}

// A way that Elastic has no bar against is compared with its first copy rate, and by the middle run of each.
func TestFaster(t *testing.T) {
	slow := run(scaling.Elastic, 9, 1, 1, 1)
	slow.CopyRate = 10
	all := []scaling.Figures{run(scaling.Elastic, 2, 1, 1, 1), slow, run(scaling.Standby, 7, 1, 1, 1), run(scaling.Standby, 5, 1, 1, 1), run(scaling.Standby, 6, 1, 1, 1)}
	if x := scaling.Faster(all, scaling.Standby); x != 3 {
		t.Errorf("%g times, want 3", x)
	}
	if x := scaling.Faster(all[:2], scaling.Standby); x != 0 {
		t.Errorf("%g times without a standby", x)
	}
	if b := scaling.Bars(all, 100, true); len(b) != 5 {
		t.Errorf("%+v; want no bar against a standby", b)
	}
}

// Several runs of a way are one row: the mean latency and its deviation, the medians, the largest peak, and all requests.
func TestSummaries(t *testing.T) {
	a, b, c := run(scaling.Elastic, 1, 0.2, 50, 1060), run(scaling.Elastic, 3, 0.4, 40, 1100), run("cold", 9, 5, 1, 2000)
	a.Failed, a.Parts, b.Parts = 1, map[string]float64{"copy_s": 1}, map[string]float64{"copy_s": 2}
	s := scaling.Summaries([]scaling.Figures{a, c, b})
	if len(s) != 2 || s[0].Strategy != scaling.Elastic || s[1].Strategy != "cold" || s[1].Runs != 1 || s[1].Latency != 9 || s[1].Deviation != 0 {
		t.Fatalf("%+v", s)
	}
	x := s[0]
	if x.Runs != 2 || x.Latency != 2 || x.Deviation != 1 || math.Abs(x.During.Gap-0.3) > 1e-9 || math.Abs(x.Gaps-3) > 1e-9 || math.Abs(x.Throughput-0.9) > 1e-9 ||
		x.Peak != 1100 || x.Sent != 20 || x.Failed != 1 || x.Parts["copy_s"] != 1.5 || x.During.Rate != 45 {
		t.Errorf("%+v", x)
	}
}
