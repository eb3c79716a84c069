package benchcmd

import (
	"errors"
	"slices"
	"testing"
	"time"

	"trireme.dev/services/trireme/load"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/npu/pace"
)

func TestSweep(t *testing.T) {
	for npus, want := range map[int][]string{
		2: {"2EPD", "1EP1D"},
		3: {"3EPD", "1EP2D", "1E1P1D"},
		4: {"4EPD", "1EP3D", "2E1P1D", "1E1P2D"},
		8: {"8EPD", "2EP6D", "5E2P1D", "1E3P4D"},
	} {
		if got := sweep(npus); !slices.Equal(got, want) {
			t.Errorf("%d NPUs: %v", npus, got)
		}
	}
	for npus := 2; npus <= 64; npus++ {
		for _, text := range sweep(npus) {
			if topology, err := conf.ParseTopology(text); err != nil || topology.NPUs() != npus {
				t.Errorf("%s has %d NPUs, want %d; %v", text, topology.NPUs(), npus, err)
			}
		}
	}
}

// What the plan says takes no longer than the time given, and comes near it; what cannot be done in it is refused.
func TestComparePlan(t *testing.T) {
	c := Compare{
		NPUs: 8, Pace: "epd-minicpm-a100", Pictures: []load.Span{{Min: 0, Max: 0}, {Min: 4, Max: 4}}, Size: load.Size{W: 256, H: 256},
		Words: load.Span{Min: 8, Max: 24}, Output: load.Span{Min: 16, Max: 16}, Repeats: 2, Time: 10 * time.Minute,
	}
	s, err := c.plan()
	if err != nil {
		t.Fatal(err)
	}
	if took := c.takes(s, s.sending); took > c.Time || took < c.Time*3/4 {
		t.Errorf("runs of %v take %v of %v", s.sending, took, c.Time)
	}
	// 4 x 440 ms, and 48 words' tokens and 256 of pictures at 0.07 and 0.7 ms.
	if w := s.Workloads[1]; w.Encode != 1760 || w.Prefill < 181 || w.Prefill > 183 || w.TTFTBound < 2*1941 {
		t.Errorf("%+v", w)
	}
	if s.rates[1][2] > 8/1.94 || s.rates[0][2] > mostRate {
		t.Errorf("rates beyond what 8 NPUs can do: %v", s.rates)
	}
	for name, change := range map[string]func(*Compare){
		"time":       func(c *Compare) { c.Time = time.Minute },
		"repeats":    func(c *Compare) { c.Repeats = 1 },
		"NPUs":       func(c *Compare) { c.Topologies = []string{"4EPD"} },
		"topologies": func(c *Compare) { c.Topologies = []string{"8X"} },
		"goodput":    func(c *Compare) { c.Goodput = []string{"ttft"} },
		"rates":      func(c *Compare) { c.Rates = []float64{0, 1} },
	} {
		bad := c
		change(&bad)
		if _, err := bad.plan(); !errors.Is(err, ErrUsage) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A prompt's price is the profile's, whatever it is made of.
func TestCosts(t *testing.T) {
	p, err := pace.Load("distserve-opt-13b-a100")
	if err != nil {
		t.Fatal(err)
	}
	encode, prefill := costs(p, 2, 64, 72) // 200 tokens, 20,000 pairs
	if want := 18.10 + 200*0.10191 + 0.02*14.24; encode != 880 || prefill < want-1e-3 || prefill > want+1e-3 {
		t.Errorf("%g ms and %g ms, want 880 and %g", encode, prefill, want)
	}
}
