// Package prefill is the prefill stage: prompt to KV and the first token. It takes messages late, computes prompts in
// chunks that share batches, writes the first token of each choice to its token log, sends it to the gateway and
// publishes one decode message a choice.
package prefill

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/engine/sample"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// Config is a prefill instance's configuration.
type Config struct {
	Stage stage.Config
	Rows  int // most prompt tokens of one batch on each NPU; 0: 512
	Slots int // requests in work at once on each NPU; 0: 32
	// Policy puts the requests in work in order, after their priority and tenant. Their targets are known from their messages.
	Policy sched.Policy
}

// Run opens a stage process and serves the prefill queue until ctx ends: Serve for those who have no stage open, as tests
// do; the command opens its own. It returns an error when it cannot start or loses the HMM.
func Run(ctx context.Context, cfg Config, log *slog.Logger) error {
	s, err := stage.Open(ctx, stage.Prefill, cfg.Stage, log)
	if err != nil {
		return err
	}
	defer s.Close()
	return Serve(ctx, s, cfg)
}

// Serve runs the prefill stage on an open stage process.
func Serve(ctx context.Context, s *stage.Stage, cfg Config) error { return s.Serve(ctx, Role(cfg)) }

// Role is the prefill stage as a role of a stage process.
func Role(cfg Config) stage.Role {
	if cfg.Rows == 0 {
		cfg.Rows = 512
	}
	if cfg.Slots == 0 {
		cfg.Slots = 32
	}
	return stage.Role{Name: stage.Prefill, Slots: cfg.Slots, Finish: true, Start: func(s *stage.Stage) (stage.Worker, error) {
		p := &prefill{
			Stage: s, space: sample.NewSpace(s.Model.Text.Vocab),
			rows: s.Metrics.Rows.WithLabelValues(stage.Prefill), jobs: map[*job]bool{},
			epoch: time.Now(), queue: sched.NewQueue(sched.Order{Policy: cfg.Policy, Patience: patience}),
		}
		s.Runner.AddPrompts(stage.Prefill, p, cfg.Rows, cfg.Slots)
		return p, nil
	}}
}

// prefill is the running role. The process' runner, called the loop here, owns jobs, lanes and what is taken (batch.go); others
// reach it through do.
type prefill struct {
	*stage.Stage
	space *sample.Space
	rows  prometheus.Counter

	lanes []*lane // in order of arrival
	jobs  map[*job]bool
	taken []*lane // those in the step being computed, in its order
	put   []*lane // those out of the queue whose turn it is not, while a step is formed

	epoch  time.Time    // times of sched count from here
	queue  *sched.Queue // of lanes: all but taken
	formed time.Time    // when the step being computed was

	pace speed        // how long steps take
	owed atomic.Int64 // prompt tokens in work that are to be computed
}

// patience is how long after its arrival a request without a target is due under the policy slo: as long as gateways let
// requests wait by default.
const patience = 30 * time.Second

// do runs f on the loop's goroutine, now or later, as long as there are handlers.
func (p *prefill) do(f func()) { p.Runner.Do(f) }

// Close implements stage.Worker.
func (p *prefill) Close() {}

// Handle implements stage.Worker.
func (p *prefill) Handle(ctx context.Context, d *bus.Delivery) {
	var m wire.Prefill
	if err := wire.Unmarshal(d.Data, &m); err != nil {
		p.Log.Error("dropping a message that is no prefill message", "error", err)
		_ = d.Ack(ctx)
		return
	}
	if keys, taken := p.offered(ctx, d, &m); !taken {
		p.handle(ctx, d, &m, keys, 0)
	}
}

// handle works on a message and settles it; keys are those of its prompt's blocks, if they are known, and owes is what is owed for it already
// (see owe).
func (p *prefill) handle(ctx context.Context, d *bus.Delivery, m *wire.Prefill, keys []hbm.Key, owes int) {
	j := &job{request: m.Request, hits: m.Hits, keys: keys, owes: owes, done: make(chan error, 1)}
	defer func() { p.owe(j, 0) }()
	p.Work(ctx, d, m.Request, 0, func(ctx context.Context, claim *hbm.Claim) error {
		j.ctx, j.claim = ctx, claim
		return p.work(ctx, m, j)
	})
}

// work computes one request and publishes its decode messages.
func (p *prefill) work(ctx context.Context, m *wire.Prefill, j *job) error {
	j.place = m.Place.After(-time.Since(p.epoch)) // from the epoch on
	spec, err := p.Spec(ctx, m.Inline, m.Spec)
	if err != nil {
		return err
	}
	if len(m.MM) != len(spec.Pictures) {
		return fmt.Errorf("%d MM objects for %d pictures: %w", len(m.MM), len(spec.Pictures), mem.ErrInvalid)
	}
	j.spec = spec
	p.owe(j, len(spec.Prompt))
	defer func() { p.Free(ctx, append(j.mm, j.memory...)...); j.seat.Leave() }()
	if err := p.prepare(ctx, j, m.MM); err != nil {
		return err
	}
	p.owe(j, len(spec.Prompt)-j.cached)
	p.do(func() { p.add(j) }) // the loop outlives all handlers
	select {
	case err = <-j.done:
	case <-ctx.Done():
		p.do(func() { p.drop(j, context.Cause(ctx)) })
		err = <-j.done
	}
	p.Pass(j.claim)
	if err != nil {
		return err
	}
	// Before the decoder can end the request: who asks the same next shall find it.
	p.CacheBlocks(ctx, j.choices[0].seq, j.keys, j.shared)
	return p.publish(ctx, m, j)
}

// publish makes KV and logs the request's, which have been this process' own, and sends one decode message a choice.
func (p *prefill) publish(ctx context.Context, m *wire.Prefill, j *job) error {
	if err := p.HBM.Keep(ctx, stage.Ref(m.Request), j.memory...); err != nil {
		return fmt.Errorf("handing over KV: %w", err)
	}
	for c := range j.choices {
		if p.Ended(m.Request, c) { // all that there was to do for it
			continue
		}
		if !j.claim.Held() {
			return mem.ErrFenced
		}
		id := fmt.Sprintf("%s.%d.d%d", m.Request.ID, m.Request.Attempt, c)
		err := p.Bus.Publish(ctx, stage.Decode, m.Request.ID, id, &wire.Decode{
			Request: m.Request, Choice: c, Inline: m.Inline, Spec: m.Spec, Log: j.choices[c].object.Handle(), RopeBase: j.delta,
		})
		if err != nil {
			return fmt.Errorf("publishing the decode message of choice %d: %w", c, err)
		}
	}
	return nil
}
