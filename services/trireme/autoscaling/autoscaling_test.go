package autoscaling

import (
	"bytes"
	"encoding/csv"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/sched/simulate"
)

var update = flag.Bool("update", false, "write the golden outcomes anew")

func lab(t *testing.T, seeds ...uint64) *Lab {
	t.Helper()
	p, err := pace.Load("distserve-opt-13b-a100")
	if err != nil {
		t.Fatal(err)
	}
	return &Lab{Profile: p, Seeds: seeds, Policy: autoscale.Default()}
}

func find(t *testing.T, name string) *Scenario {
	t.Helper()
	s, err := Find(name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func play(t *testing.T, l *Lab, s *Scenario, rate float64, w Way) *Run {
	t.Helper()
	r, err := l.Play(s, rate, w)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// What NPUs take is the profile's to the nanosecond.
func TestCosts(t *testing.T) {
	l := lab(t)
	c := Costs{l.Profile}
	w := simulate.Work{Prompt: 300, Visual: 128, Pairs: 45150, Decoding: 7, Context: 3000}
	if got, want := c.Step(w), l.Profile.Cost(kernel.Work{Prompt: 300, Visual: 128, Pairs: 45150, Decoding: 7, Context: 3000}); got != want {
		t.Errorf("a step takes %v, want %v", got, want)
	}
	if got := c.Encode(64); got != 440*time.Millisecond {
		t.Errorf("a picture takes %v", got)
	}
}

func TestNotation(t *testing.T) {
	if got := wide("3E2P1D"); got != "1Ex3,1Px2,1Dx1" || singles(got+"+4") != "3E2P1D+4" {
		t.Errorf("%s and %s", got, singles(got+"+4"))
	}
}

// A topology is only left out when some stages have too little, those with NPUs in common looked at together.
func TestEnough(t *testing.T) {
	need := [8]float64{1: 4, 2: 1, 4: 2, 3: 5, 5: 6, 6: 3, 7: 7} // by set: encode, prefill, decode and their sums
	for topology, want := range map[string]bool{
		"4E1P2D": true, "3E1P2D": false, "6EPD": true, "5EPD": false, "5EP2D": true, "3EP2D": false, "4E3PD": true, "5E2PD": false,
	} {
		if got := enough(fleet(topology), need); got != want {
			t.Errorf("%s: %v", topology, got)
		}
	}
}

// The wave has the mean and the peak that its text says.
func TestWave(t *testing.T) {
	sum, most := 0.0, 0.0
	for k := range 1000 {
		w := Wave((float64(k) + 0.5) / 1000)
		sum, most = sum+w/1000, max(most, w)
	}
	if math.Abs(sum-0.4375) > 1e-3 || most > 1 || most < 0.999 {
		t.Errorf("mean %g, peak %g", sum, most)
	}
}

// What comes of scenarios with one seed, as it was last time: a change of the simulator or of decisions shows here.
func TestGolden(t *testing.T) {
	l := lab(t, 1)
	var b strings.Builder
	for _, c := range []struct {
		name string
		rate float64
	}{{"mix", 1.6}, {"burst", 12}, {"ramp", 6}, {"paper", 3}} {
		s := find(t, c.name)
		for _, w := range append(l.Rivals(s, s.Start), l.Scaler(s), Static(s.Start)) {
			if w.Name == "epd-trigger" && fleet(s.Start).Spare > 0 {
				w.Topology = wide("6E1P1D")
			}
			r := play(t, l, s, c.rate, w)
			fmt.Fprintf(&b, "%-6s %-16s %-18s %4.0f requests, within targets %.2f, mean latency %5.1f s, %5.2f NPUs, %2.0f changes\n",
				s.Name, r.By, r.Topology, r.Requests, r.Attainment, r.Latency, r.MeanNPUs, r.Changes)
		}
	}
	file := filepath.Join("testdata", "outcomes.txt")
	if *update {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("%s: now\n%swas\n%s", file, b.String(), want)
	}
}

// The bars of the mix, and the scaler's side of those of the burst and the noise. The wave's take too long for a test:
// `trireme bench autoscale wave`.
func TestBars(t *testing.T) {
	l := lab(t, 1, 2, 3)
	mix := find(t, "mix")
	static, err := l.Overload(mix, mix.Start, staticMix)
	if err != nil {
		t.Fatal(err)
	}
	if math.Abs(static.Attainment-staticMix) > 0.03 {
		t.Errorf("at %.2f requests a second %s attains %.3f, want %.2f", static.Rate, mix.Start, static.Attainment, staticMix)
	}
	ours := play(t, l, mix, static.Rate, l.Scaler(mix))
	t.Logf("mix at %.2f requests a second: %.3f within targets, latency %.1f s; static %.3f and %.1f s", static.Rate, ours.Attainment, ours.Latency, static.Attainment, static.Latency)
	if ours.Attainment < 0.8 || ours.Latency > static.Latency/2 {
		t.Errorf("mix: %.3f within targets, latency %.1f s, of %.1f s of %s", ours.Attainment, ours.Latency, static.Latency, mix.Start)
	}
	burst := find(t, "burst")
	if r := play(t, l, burst, burst.Rate, l.Scaler(burst)); r.Attainment < 0.9 || r.MeanNPUs > 9 {
		t.Errorf("burst: %.3f within targets, with %.2f NPUs", r.Attainment, r.MeanNPUs)
	} else if s := play(t, l, burst, burst.Rate, Static("7E1P1D")); s.Attainment >= 0.6 {
		t.Errorf("burst: 7E1P1D attains %.3f", s.Attainment)
	}
	noise := find(t, "noise")
	if r := play(t, l, noise, noise.Rate, l.Scaler(noise)); r.Changes > r.Hours {
		t.Errorf("noise: %.1f changes in %.0f hours", r.Changes, r.Hours)
	}
}

// A report's series has every request and every NPU-second of its run.
func TestSeries(t *testing.T) {
	l := lab(t, 7)
	s := find(t, "burst")
	r := play(t, l, s, 4, l.Scaler(s))
	requests, held := 0.0, 0.0
	width := 10 * time.Second
	for _, p := range r.Series(s, width) {
		requests += p.Arrivals * width.Seconds()
		held += p.Held * width.Hours()
	}
	if math.Abs(requests-r.Requests) > 0.01 || math.Abs(held-r.NPUHours) > 0.02*r.NPUHours {
		t.Errorf("%.2f requests and %.3f NPU-hours in the series, %.0f and %.3f in the run", requests, held, r.Requests, r.NPUHours)
	}
	var b bytes.Buffer
	report := &Report{Scenario: s, Name: s.Name, Runs: []*Run{r}}
	if err := WriteCSV(&b, []*Report{report}); err != nil {
		t.Fatal(err)
	}
	rows, err := csv.NewReader(&b).ReadAll()
	if err != nil || len(rows) < 100 || len(rows[0]) != 15 {
		t.Errorf("%d rows, %v", len(rows), err)
	}
}

func TestFindErrors(t *testing.T) {
	if _, err := Find("storm"); !errors.Is(err, ErrScenario) || !strings.Contains(err.Error(), "burst") {
		t.Errorf("%v", err)
	}
}
