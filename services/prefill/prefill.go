// Package prefill is the prefill stage: prompt to KV and the first token. It takes messages late, computes prompts in
// chunks that share batches, writes the first token of each choice to its token log, sends it to the gateway and
// publishes one decode message a choice.
package prefill

import (
	"context"
	"fmt"
	"log/slog"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/engine"
	"trireme.dev/shared/engine/sample"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// Config is a prefill instance's configuration.
type Config struct {
	Stage stage.Config
	Rows  int // most prompt tokens of one batch; 0: 512
	Slots int // requests in work at once; 0: 32
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
func Serve(ctx context.Context, s *stage.Stage, cfg Config) error {
	if cfg.Rows == 0 {
		cfg.Rows = 512
	}
	if cfg.Slots == 0 {
		cfg.Slots = 32
	}
	text, err := engine.NewText(s.Model, s.Weights, s.Compute, engine.Limits{Rows: cfg.Rows, Seqs: cfg.Slots})
	if err != nil {
		return err
	}
	p := &prefill{
		Stage: s, text: text, limits: text.Limits(), space: sample.NewSpace(s.Model.Text.Vocab),
		inbox: make(chan func()), stop: make(chan struct{}), jobs: map[*job]bool{},
	}
	s.OnEnd(func(m wire.Done) {
		if m.Choice < 0 {
			p.do(func() { p.end(m.Request) })
		}
	})
	loop := make(chan struct{})
	go func() { defer close(loop); p.run() }()
	err = s.Serve(ctx, cfg.Slots, p.handle)
	close(p.stop)
	<-loop
	return err
}

// prefill is the running stage. The batch loop (batch.go) owns jobs and lanes; others reach it through do.
type prefill struct {
	*stage.Stage
	text   *engine.Text
	limits engine.Limits
	space  *sample.Space
	inbox  chan func()
	stop   chan struct{} // closed when the loop shall end

	lanes []*lane // in order of arrival
	jobs  map[*job]bool
}

// do runs f on the loop's goroutine. It returns false, without running f, when the loop has ended.
func (p *prefill) do(f func()) bool {
	select {
	case p.inbox <- f:
		return true
	case <-p.stop:
		return false
	}
}

func (p *prefill) handle(ctx context.Context, d *bus.Delivery) {
	var m wire.Prefill
	if err := wire.Unmarshal(d.Data, &m); err != nil {
		p.Log.Error("dropping a message that is no prefill message", "error", err)
		_ = d.Ack(ctx)
		return
	}
	claim, err := p.HBM.Claim(ctx, hbm.Part{
		Request: m.Request.ID, Attempt: m.Request.Attempt, Left: m.Request.Left, Stage: stage.Prefill,
	}, d.Reply)
	if err == nil {
		err = p.work(ctx, &m, claim)
	}
	p.Settle(ctx, d, m.Request, claim, err)
}

// work computes one request and publishes its decode messages.
func (p *prefill) work(ctx context.Context, m *wire.Prefill, claim *hbm.Claim) error {
	spec, err := p.Spec(ctx, m.Inline, m.Spec)
	if err != nil {
		return err
	}
	if len(m.MM) != len(spec.Pictures) {
		return fmt.Errorf("%d MM objects for %d pictures: %w", len(m.MM), len(spec.Pictures), mem.ErrInvalid)
	}
	j := &job{request: m.Request, spec: spec, claim: claim, hits: m.Hits, done: make(chan error, 1)}
	defer func() { p.Free(ctx, append(j.mm, j.memory...)...) }()
	if err := p.prepare(ctx, j, m.MM); err != nil {
		return err
	}
	p.do(func() { p.add(j) }) // the loop outlives all handlers
	select {
	case err = <-j.done:
	case <-ctx.Done():
		p.do(func() { p.drop(j, context.Cause(ctx)) })
		err = <-j.done
	}
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
