package autoscaling

import (
	"slices"
	"time"

	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/sched/simulate"
)

// Felt is what clients felt of a load.
type Felt struct {
	TTFT   float64 `json:"mean_ttft_ms"`
	TTFT90 float64 `json:"p90_ttft_ms"`
	TPOT   float64 `json:"mean_tpot_ms"`
	E2E    float64 `json:"mean_e2el_ms"`
	Tokens float64 `json:"output_tokens_per_s"` // until the last answer ended
}

// Replay simulates a load on a topology that stays as it is, with a gateway as `trireme up` has it by default.
func (l *Lab) Replay(topology string, load []simulate.Request) (*Felt, error) {
	cfg := l.config(&Scenario{Targets: sched.Targets{}}, topology, l.Seeds[0], nil)
	cfg.KV = 0
	f, err := simulate.New(cfg)
	if err != nil {
		return nil, err
	}
	d, err := f.Run(load, 0)
	if err != nil {
		return nil, err
	}
	return FeltOf(d), nil
}

// FeltOf is what clients felt of a simulated load.
func FeltOf(r *simulate.Result) *Felt {
	felt := NewFelt(len(r.Outcomes))
	for i := range r.Outcomes {
		o := &r.Outcomes[i]
		felt.Add(o.Arrive, o.TTFT, o.TPOT, o.E2E, o.Output)
	}
	return felt.End()
}

// Burst simulates phases on a fleet that begins as topology, with the scaler or without.
func (l *Lab) Burst(t sched.Targets, start, topology string, phases func() []simulate.Phase, scaled bool) (*Run, error) {
	s := &Scenario{Name: "live", Start: start, Targets: t, Phases: func(float64) []simulate.Phase { return phases() }}
	w := Static(topology)
	if scaled {
		l.Policy = autoscale.Default()
		w = l.Scaler(s)
	}
	return l.Play(s, 1, w)
}

// Feeling collects what clients felt.
type Feeling struct {
	felt   Felt
	ttfts  []float64
	tpots  int
	tokens int
	last   time.Duration
}

// NewFelt begins with so many answers.
func NewFelt(answers int) *Feeling { return &Feeling{ttfts: make([]float64, 0, answers)} }

// Add adds an answer of so many tokens; tpot 0: it had one.
func (f *Feeling) Add(sent, ttft, tpot, e2e time.Duration, tokens int) {
	ms := func(d time.Duration) float64 { return 1e3 * d.Seconds() }
	f.ttfts = append(f.ttfts, ms(ttft))
	f.felt.TTFT += ms(ttft)
	f.felt.E2E += ms(e2e)
	if tpot > 0 {
		f.felt.TPOT += ms(tpot)
		f.tpots++
	}
	f.tokens += tokens
	f.last = max(f.last, sent+e2e)
}

// End is all of it. At least one answer was added.
func (f *Feeling) End() *Felt {
	n := float64(len(f.ttfts))
	f.felt.TTFT, f.felt.E2E = f.felt.TTFT/n, f.felt.E2E/n
	f.felt.TPOT /= float64(max(1, f.tpots))
	slices.Sort(f.ttfts)
	f.felt.TTFT90 = f.ttfts[len(f.ttfts)*9/10]
	f.felt.Tokens = float64(f.tokens) / f.last.Seconds()
	return &f.felt
}
