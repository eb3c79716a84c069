// Package autoscaling compares ways to decide the size and the roles of a fleet, by simulation: scenarios of loads, runs of them under a
// Controller or on a fixed topology, and the bars that `trireme bench autoscale` prints. It is arithmetic on what shared/sched/simulate
// says; benchcmd prints and draws.
package autoscaling

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"trireme.dev/shared/conf"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/simulate"
)

// ErrScenario is wrapped by errors of Find.
var ErrScenario = errors.New("no such scenario")

// Costs are those of a profile's NPUs.
type Costs struct{ Profile *pace.Profile }

// Encode implements simulate.Costs.
func (c Costs) Encode(tokens int) time.Duration {
	return c.Profile.Cost(kernel.Work{Tokens: tokens, Parts: 1})
}

// Step implements simulate.Costs.
func (c Costs) Step(w simulate.Work) time.Duration {
	return c.Profile.Cost(kernel.Work{Prompt: w.Prompt, Visual: w.Visual, Pairs: w.Pairs, Decoding: w.Decoding, Context: w.Context})
}

// Copy implements simulate.Costs.
func (c Costs) Copy(tokens int) time.Duration { return c.Profile.CopyCost(tokens, 0) }

// Scenario is a load and the fleet that it meets.
type Scenario struct {
	Name  string
	Text  string // a sentence about it
	Start string // topology at the beginning, with wide instances and spare NPUs
	Rate  float64
	// Phases is the load at a rate: requests a second, of the whole or of its peak.
	Phases  func(rate float64) []simulate.Phase
	Targets sched.Targets
	// Search says that the best static topology is looked for among all.
	Search bool
	// Keep says that all NPUs are there anyway: none is made spare, which would save nothing.
	Keep bool
	// Settle is how long a fleet may take to find what it needs before it is judged; requests of that time do not count.
	Settle time.Duration
}

// Visual is the multimodal tokens of a picture, as bench serve's of 256 x 256 have with the bundled model.
const visual = 64

// targets are those of EPD's evaluation (arXiv:2501.05460v4, table 9, MiniCPM-V 2.6 with eight pictures), the loosest of its model.
var targets = sched.Targets{TTFT: 5100 * time.Millisecond, TPOT: 60 * time.Millisecond}

var (
	chat    = simulate.Kind{Words: [2]int{50, 350}, Output: [2]int{50, 150}}
	look    = simulate.Kind{Pictures: [2]int{2, 2}, Visual: visual, Words: [2]int{20, 60}, Output: [2]int{50, 150}}
	albums  = simulate.Kind{Pictures: [2]int{8, 8}, Visual: visual, Words: [2]int{20, 60}, Output: [2]int{50, 150}}
	essays  = simulate.Kind{Words: [2]int{50, 350}, Output: [2]int{900, 1100}}
	shorts  = simulate.Kind{Pictures: [2]int{1, 1}, Visual: visual, Words: [2]int{22, 22}, Output: [2]int{50, 50}}
	stories = simulate.Kind{Pictures: [2]int{1, 1}, Visual: visual, Words: [2]int{22, 22}, Output: [2]int{500, 500}}
)

func steady(length time.Duration, rate float64, k simulate.Kind) simulate.Phase {
	of, peak := simulate.Steady(rate)
	return simulate.Phase{Length: length, Rate: of, Peak: peak, Kind: k}
}

// Wave is the part of its peak that a day's load has: 10% at night, a peak in the evening, 44% on average.
func Wave(part float64) float64 {
	up := (1 - math.Cos(2*math.Pi*part)) / 2
	return 0.1 + 0.9*up*up
}

// Day is the length of the daily wave: a day would only take longer to simulate. A load that changes 12 times as fast is harder to follow.
const Day = 2 * time.Hour

// Scenarios are all there are.
var Scenarios = []Scenario{
	{
		Name: "mix", Text: "text only, then eight pictures a request, then answers of 1,000 tokens, four minutes each at the same rate",
		Start: "1Ex5,1Px2,1Dx1", Targets: targets, Keep: true, Search: true,
		Phases: func(r float64) []simulate.Phase {
			return []simulate.Phase{steady(4*time.Minute, r, chat), steady(4*time.Minute, r, albums), steady(4*time.Minute, r, essays)}
		},
	},
	{
		Name: "paper", Text: "EPD's experiment (table 6): requests with a picture each, about 10 with answers of 50 tokens, then 90 with 500",
		Start: "1Ex5,1Px1,1Dx2", Targets: targets, Rate: 3, Keep: true, Search: true,
		Phases: func(r float64) []simulate.Phase {
			s := func(n float64) time.Duration { return time.Duration(n / r * float64(time.Second)) }
			return []simulate.Phase{steady(s(10), r, shorts), steady(s(90), r, stories)}
		},
	},
	{
		Name: "burst", Text: "ten times the load for two minutes",
		Start: "1Ex1,1Px1,1Dx1+29", Targets: targets, Rate: 12, Search: true,
		Phases: func(r float64) []simulate.Phase {
			return []simulate.Phase{steady(4*time.Minute, r/10, look), steady(2*time.Minute, r, look), steady(6*time.Minute, r/10, look)}
		},
	},
	{
		Name: "ramp", Text: "from a tenth to all of the load in five minutes, and back",
		Start: "1Ex1,1Px1,1Dx1+13", Targets: targets, Rate: 6, Search: true,
		Phases: func(r float64) []simulate.Phase {
			const half = 5 * time.Minute
			up := func(since time.Duration) float64 {
				return r * (0.1 + 0.9*(1-math.Abs(1-since.Seconds()/half.Seconds())))
			}
			return []simulate.Phase{steady(time.Minute, r/10, look), {Length: 2 * half, Rate: up, Peak: r, Kind: look}, steady(2*time.Minute, r/10, look)}
		},
	},
	{
		Name: "wave", Text: fmt.Sprintf("a day's load, in %v: 10%% at night, 44%% on average", Day),
		Start: "1Ex4,1Px1,1Dx1+58", Targets: targets, Rate: 24,
		Phases: func(r float64) []simulate.Phase {
			return []simulate.Phase{{Length: Day, Peak: r, Kind: look, Rate: func(since time.Duration) float64 {
				return r * Wave(since.Seconds()/Day.Seconds())
			}}}
		},
	},
	{
		Name: "noise", Text: "three hours of a steady load that only chance varies",
		Start: "1Ex1,1Px1,1Dx1+13", Targets: targets, Rate: 3, Settle: 10 * time.Minute,
		Phases: func(r float64) []simulate.Phase {
			return []simulate.Phase{steady(3*time.Hour+10*time.Minute, r, look)}
		},
	},
}

// Find is the scenario of a name.
func Find(name string) (*Scenario, error) {
	var names []string
	for i := range Scenarios {
		if Scenarios[i].Name == name {
			return &Scenarios[i], nil
		}
		names = append(names, Scenarios[i].Name)
	}
	return nil, fmt.Errorf("%w: %q; there are %s", ErrScenario, name, strings.Join(names, ", "))
}

// NPUs is how many there are, spare ones included.
func (s *Scenario) NPUs() int { return fleet(s.Start).NPUs() }

func fleet(topology string) conf.Topology {
	t, err := conf.ParseTopology(topology)
	if err != nil {
		panic("BUG: a topology of ours: " + err.Error())
	}
	return t
}

// singles is a topology with instances of one NPU each.
func singles(topology string) string {
	t, out := fleet(topology), ""
	for _, g := range t.Groups {
		out += fmt.Sprintf("%d%s", g.Count*g.NPUs, g.Roles)
	}
	if t.Spare > 0 {
		out += fmt.Sprintf("+%d", t.Spare)
	}
	return out
}

// wide is the topology with one instance for each group.
func wide(topology string) string {
	var all []string
	for _, g := range fleet(topology).Groups {
		all = append(all, fmt.Sprintf("1%sx%d", g.Roles, g.Count*g.NPUs))
	}
	return strings.Join(all, ",")
}
