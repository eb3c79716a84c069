// Package standin is the stages without their work, for `trireme bench control` alone: roles that take messages, claim,
// send tokens, publish what comes next and settle as the real ones do (shared/stage is the same), but compute nothing, map
// nothing and answer at once, or one token a step. What a system of them costs is what everything around the models costs.
package standin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/token"
	"trireme.dev/shared/wire"
)

// Diary is what a stand-in noted: when it took and passed on what, in nanoseconds of Unix time.
type Diary struct {
	Parts []Part  `json:"parts"`
	Steps []int64 `json:"steps,omitempty"` // of decode: when the tokens of each step were there
}

// Part is one message's life with a stand-in.
type Part struct {
	Request string `json:"request"`
	Taken   int64  `json:"taken"`           // its handler began
	Token   int64  `json:"token,omitempty"` // of prefill: its token was there
	Passed  int64  `json:"passed"`          // before the next message was published; 0: there was none
	First   int    `json:"first"`           // of decode: the step that made its first token, which has index 1
}

// notes collects a Diary.
type notes struct {
	mu sync.Mutex
	d  Diary
}

func (n *notes) add(p Part) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.d.Parts = append(n.d.Parts, p)
}

// take empties the diary.
func (n *notes) take() Diary {
	n.mu.Lock()
	defer n.mu.Unlock()
	d := n.d
	n.d = Diary{}
	return d
}

// Config is what a stand-in is started with.
type Config struct {
	Stage stage.Config
	Role  string        // stage.Encode, Prefill or Decode
	Step  time.Duration // of decode: between two tokens; 0: as soon as something is due
	Phase time.Duration // of decode: steps are at whole multiples of Step in Unix time, and so much later
	Slots int           // messages in work at once
}

// Run serves a role until in ends. For each line that it reads it writes what was noted since the last one, a Diary as JSON,
// to out.
func Run(ctx context.Context, cfg Config, in io.Reader, out io.Writer, open func() (*stage.Stage, error)) error {
	s, err := open()
	if err != nil {
		return err
	}
	defer s.Close()
	tokens, err := token.Load(s.Dir())
	if err != nil {
		return err
	}
	p := part{notes: new(notes)}
	if p.word, err = plain(tokens); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	go func() { cancel(report(p.notes, in, out)) }()
	err = s.Serve(ctx, stage.Role{Name: cfg.Role, Slots: cfg.Slots, Start: func(s *stage.Stage) (stage.Worker, error) {
		p.Stage = s
		switch cfg.Role {
		case stage.Encode:
			return &encoder{p}, nil
		case stage.Prefill:
			return &prefill{p}, nil
		}
		return newDecoder(p, cfg.Step, cfg.Phase)
	}})
	if cause := context.Cause(ctx); err == nil && !errors.Is(cause, context.Canceled) && !errors.Is(cause, io.EOF) {
		err = cause
	}
	return err
}

// report answers lines with diaries.
func report(n *notes, in io.Reader, out io.Writer) error {
	line, answers := make([]byte, 1), json.NewEncoder(out)
	for {
		if _, err := in.Read(line); err != nil {
			return err
		}
		if line[0] != '\n' {
			continue
		}
		if err := answers.Encode(n.take()); err != nil {
			return fmt.Errorf("handing over what was noted: %w", err)
		}
	}
}

// plain finds a token that is a letter by itself, so that each one of an answer is an event of its own.
func plain(t *token.Tokenizer) (int32, error) {
	for id := range t.Size() {
		if text, special, ok := t.Token(id); ok && !special && len(text) == 1 && text[0] >= 'a' && text[0] <= 'z' {
			return int32(id), nil
		}
	}
	return 0, errors.New("the model has no token that is a letter")
}

// part is what the roles have in common.
type part struct {
	*stage.Stage
	*notes
	word int32
}

// Close implements stage.Worker.
func (part) Close() {}

// handle reads a message and has do work on it.
func (p *part) handle(ctx context.Context, d *bus.Delivery, m any, of func() (wire.Request, int), do func(context.Context, *hbm.Claim) error) {
	if err := wire.Unmarshal(d.Data, m); err != nil {
		p.Log.Error("dropping a message that cannot be read", "error", err)
		_ = d.Ack(ctx)
		return
	}
	req, number := of()
	p.Work(ctx, d, req, number, do)
}

type encoder struct{ part }

// Handle implements stage.Worker: it marks the picture as encoded.
func (e *encoder) Handle(ctx context.Context, d *bus.Delivery) {
	n := Part{Taken: time.Now().UnixNano()}
	var m wire.Encode
	e.handle(ctx, d, &m, func() (wire.Request, int) { return m.Request, m.Part }, func(ctx context.Context, _ *hbm.Claim) error {
		n.Request, n.Passed = m.Request.ID, time.Now().UnixNano()
		e.add(n)
		key := wire.JoinKey(m.Request.ID, m.Request.Attempt)
		if _, err := e.Bus.Join(ctx, key); err != nil { // as the encoder looks whether its mark is there already
			return err
		}
		join, err := e.Bus.MarkJoin(ctx, key, m.Part, mem.Handle{Node: e.HBM.Node(), Kind: mem.KindMM, Shape: []int{4, 64, 128}, Sealed: true, Capability: make([]byte, 16)}, false)
		if err != nil || !join.Complete() {
			return err
		}
		return e.Bus.Publish(ctx, stage.Prefill, m.Request.ID, fmt.Sprintf("%s.%d.p", m.Request.ID, m.Request.Attempt), &join.Prefill)
	})
}

type prefill struct{ part }

// Handle implements stage.Worker: it answers with the first token.
func (p *prefill) Handle(ctx context.Context, d *bus.Delivery) {
	n := Part{Taken: time.Now().UnixNano()}
	var m wire.Prefill
	p.handle(ctx, d, &m, func() (wire.Request, int) { return m.Request, 0 }, func(ctx context.Context, _ *hbm.Claim) error {
		spec, err := p.Spec(ctx, m.Inline, m.Spec)
		if err != nil {
			return err
		}
		n.Request, n.Token = m.Request.ID, time.Now().UnixNano()
		err = stage.SendTokens(p.Bus, p.ID, m.Request.Gateway, []wire.Run{{
			Request: m.Request.ID, Attempt: m.Request.Attempt, IDs: []int32{p.word}, Computed: len(spec.Prompt),
			Pictures: len(spec.Pictures), Finish: stage.FinishOf(&spec.Sampling, 0, p.word),
		}})
		if err != nil {
			return err
		}
		n.Passed = time.Now().UnixNano()
		p.add(n)
		return p.Bus.Publish(ctx, stage.Decode, m.Request.ID, fmt.Sprintf("%s.%d.d0", m.Request.ID, m.Request.Attempt), &wire.Decode{
			Request: m.Request, Inline: m.Inline, Spec: m.Spec, Log: mem.Handle{Node: p.HBM.Node(), Kind: mem.KindLog, Capability: make([]byte, 16)},
		})
	})
}
