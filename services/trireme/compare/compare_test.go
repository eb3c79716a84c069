package compare_test

import (
	"strings"
	"testing"

	"trireme.dev/services/trireme/compare"
)

// study makes one with two repeats at rates 1, 2 and 4, in which a topology keeps its bounds up to the rates given for the
// repeats, by workload. Above, nobody does, so capacities lie on the line between: 0.1 of the way from the last rate kept.
func study(pictures []string, ratios []float64, kept map[string][][2]float64) *compare.Study {
	s := &compare.Study{Repeats: 2}
	for i := range pictures {
		s.Workloads = append(s.Workloads, compare.Workload{Pictures: pictures[i], Encode: 100 * ratios[i], Prefill: 100})
	}
	for _, t := range []string{"8EPD", "2EP6D", "5E2P1D"} {
		if kept[t] == nil {
			continue
		}
		s.Topologies = append(s.Topologies, t)
		for w, upTo := range kept[t] {
			for repeat, most := range upTo {
				for _, rate := range []float64{1, 2, 4} {
					a := 1.0
					if rate > most {
						a = 0
					}
					s.Runs = append(s.Runs, compare.Run{Topology: t, Workload: w, Rate: rate, Repeat: repeat, Attainment: a})
					if a == 0 {
						break
					}
				}
			}
		}
	}
	return s
}

func TestSeparate(t *testing.T) {
	for topology, want := range map[string]bool{
		"8EPD": false, "2EP6D": false, "5E2P1D": true, "1E1EPD1P": false, "2P2D": false, "1E1PD": true, "?": false,
	} {
		if got := compare.Separate(topology); got != want {
			t.Errorf("%s: %v", topology, got)
		}
	}
}

func TestCapacities(t *testing.T) {
	s := study([]string{"1"}, []float64{1}, map[string][][2]float64{"8EPD": {{1, 2}}, "2EP6D": {{0, 1}}, "5E2P1D": {{4, 4}}})
	c := s.Capacities(0)
	if len(c) != 3 || c[0].Topology != "5E2P1D" || !c[0].AtLeast || c[0].Low() != 4 || c[1].Topology != "8EPD" || c[1].AtLeast {
		t.Fatalf("%+v", c)
	}
	near := func(got, want float64) bool { return got > want-1e-9 && got < want+1e-9 }
	if !near(c[1].Low(), 1.1) || !near(c[1].High(), 2.2) || !near(c[1].Mean(), 1.65) || c[2].Low() != 0 || !near(c[2].High(), 1.1) {
		t.Errorf("%+v", c)
	}
}

func TestRule(t *testing.T) {
	three := []string{"0", "1", "4"}
	rising := []float64{0, 2, 8}
	for name, x := range map[string]struct {
		kept     map[string][][2]float64
		verdicts string
		rule     string
	}{
		"pays from some pictures on": {
			map[string][][2]float64{"8EPD": {{4, 4}, {2, 2}, {1, 1}}, "5E2P1D": {{4, 4}, {2, 2}, {2, 4}}},
			"no difference beyond the spread of repeats, no difference beyond the spread of repeats, pays",
			"pays from 4 pictures a request (encoding takes 8 times as long as the prompt) on, not at 1 picture",
		},
		"the spread hides it": {
			map[string][][2]float64{"8EPD": {{4, 4}, {2, 2}, {1, 2}}, "5E2P1D": {{4, 4}, {2, 2}, {2, 4}}},
			"no difference beyond the spread of repeats, no difference beyond the spread of repeats, no difference beyond the spread of repeats",
			"Not here: in no workload",
		},
		"costs": {
			map[string][][2]float64{"8EPD": {{4, 4}, {4, 4}, {2, 2}}, "5E2P1D": {{1, 2}, {1, 1}, {2, 2}}},
			"costs, costs, no difference beyond the spread of repeats", "Not here: encoding on NPUs of its own pays in none of the workloads, and costs in 2 of 3.",
		},
		"not monotonic": {
			map[string][][2]float64{"8EPD": {{1, 1}, {4, 4}, {1, 1}}, "5E2P1D": {{2, 2}, {1, 1}, {2, 2}}},
			"pays, costs, pays", "No one bound: encoding on NPUs of its own pays with 0 pictures",
		},
		"everywhere": {
			map[string][][2]float64{"8EPD": {{1, 1}, {1, 1}, {1, 1}}, "2EP6D": {{0, 0}, {1, 1}, {1, 1}}, "5E2P1D": {{2, 2}, {2, 2}, {2, 4}}},
			"pays, pays, pays", "pays in all workloads, the least of which has 0 pictures",
		},
		"one kind": {
			map[string][][2]float64{"8EPD": {{1, 1}, {1, 1}, {1, 1}}, "2EP6D": {{2, 2}, {1, 1}, {1, 1}}},
			"not compared, not compared, not compared", "Nothing can be said",
		},
	} {
		t.Run(name, func(t *testing.T) {
			findings := study(three, rising, x.kept).Findings()
			var verdicts []string
			for _, f := range findings {
				verdicts = append(verdicts, string(f.Verdict))
			}
			if got := strings.Join(verdicts, ", "); got != x.verdicts {
				t.Errorf("verdicts %s\nwant %s", got, x.verdicts)
			}
			if got := compare.Rule(findings); !strings.Contains(got, x.rule) {
				t.Errorf("the rule is %s\nwant something with %s", got, x.rule)
			}
		})
	}
}

// In what order workloads were given does not matter: the rule goes by how long pictures take beside prompts.
func TestRuleGoesByTheRatio(t *testing.T) {
	kept := map[string][][2]float64{"8EPD": {{1, 1}, {2, 2}}, "5E2P1D": {{2, 2}, {1, 1}}}
	if got := compare.Rule(study([]string{"4", "1"}, []float64{8, 2}, kept).Findings()); !strings.Contains(got, "pays from 4 pictures") ||
		!strings.Contains(got, "only above 1.1 requests a second") {
		t.Error(got)
	}
}
