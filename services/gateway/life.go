package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"trireme.dev/services/gateway/admission"
	"trireme.dev/services/gateway/openai"
	"trireme.dev/services/gateway/request"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

// Why a request's context ended, as context.Cause tells.
var (
	errDeadline = errors.New("the request's deadline has passed")
	errStopping = errors.New("the gateway is stopping")
)

// output takes what a client gets of one job, in order. An error means that the client is gone.
type output interface {
	piece(p *request.Piece) error // may keep it back until flush
	flush() error
}

// life is one job from its first message to its end. It belongs to one goroutine.
type life struct {
	g      *Gateway
	job    *job
	id     string
	out    output
	credit *admission.Credit // its own; released by whoever runs it

	objective *objective
	admitted  time.Time // when it was given its credit
	first     time.Time // when the first token came; zero before that

	answer *request.Answer
	box    *mailbox

	yielded  int // attempts that ended for want of room only
	deadline time.Time
	memory   Memory   // that the attempt's objects are in
	joins    []string // keys of join records made
	began    time.Time
	last     time.Time // when the last token came; zero before the first

	resend      *time.Timer
	resendAfter time.Duration // 0: no gap
	outErr      error
	emit        func(*request.Piece) // deliver, made once
	spare       []event
}

// newLife makes the life of a job. began is when the HTTP request arrived.
func (g *Gateway) newLife(j *job, p *openai.Params, id string, deadline, began time.Time, out output) *life {
	cfg := request.Config{Choices: p.N, Stop: p.Stop, IncludeStop: p.IncludeStop, MinTokens: p.MinTokens, Apart: g.apart}
	l := &life{
		g: g, job: j, id: id, out: out, deadline: deadline, began: began,
		answer: request.New(cfg, g.model.stream(p)),
	}
	l.emit = l.deliver
	return l
}

// apart reports whether an instance is known to be of another node than the other one, which may be gone.
func (g *Gateway) apart(instance, other string) bool {
	a, b := g.instances.Node(instance), g.instances.Node(other)
	return a != "" && a != b
}

// run sends the job to the stages and its answer to the client, and returns when every choice has ended, or with an
// *openai.Error, ctx's cause or the client's error. Whatever happens, the stages and the HMM are then told that the
// request needs nothing any more, a moment later when it ended well; released is called when the HMM knows.
func (l *life) run(ctx context.Context, released func()) (err error) {
	l.box = l.g.dispatch.open(l.id)
	l.resend = time.NewTimer(time.Hour)
	l.resend.Stop()
	defer func() {
		l.resend.Stop()
		if err == nil {
			l.g.background.Go(func() {
				l.linger()
				l.end(released)
			})
			return
		}
		l.end(released)
	}()
	if err := l.start(ctx); err != nil {
		return l.cause(ctx, err)
	}
	for !l.answer.Done() {
		select {
		case <-l.box.wake:
			err = l.events(ctx)
		case <-l.resend.C:
			l.askAgain()
		case <-l.memory.Lost():
			err = l.restart(ctx, "", "the HMM was lost")
		case <-ctx.Done():
			err = ctx.Err()
		}
		if err != nil {
			return l.cause(ctx, err)
		}
	}
	return nil
}

// cause says why ctx ended, if it did.
func (l *life) cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// events handles what has come.
func (l *life) events(ctx context.Context) error {
	events := l.box.take(l.spare)
	l.spare = events
	for i := range events {
		switch e := &events[i]; {
		case e.confirm != nil:
			c := l.answer.Confirm(e.confirm, l.emit)
			l.g.dispatch.answer(e.reply, &c)
		case e.lost != nil:
			if err := l.lost(ctx, e.lost); err != nil {
				return err
			}
		default:
			l.take(e)
		}
		if l.outErr != nil {
			return l.outErr
		}
	}
	l.watchGaps()
	return l.out.flush()
}

// take takes one run of tokens.
func (l *life) take(e *event) {
	valid := e.run.Choice >= 0 && e.run.Choice < l.job.spec.Choices
	before := 0
	if valid {
		before = l.answer.Tokens(e.run.Choice)
	}
	l.answer.Take(e.instance, e.run, l.emit)
	if !valid || l.answer.Tokens(e.run.Choice) == before {
		return
	}
	now := time.Now()
	if l.last.IsZero() {
		l.first = now
		l.credit.Started()
		if l.answer.Attempt() == 1 {
			l.g.paces.first(l.job, now.Sub(l.admitted))
		}
		l.g.metrics.ttft.Observe(now.Sub(l.began).Seconds())
		l.g.demand.first(l.job.arrival, now)
	} else {
		l.g.metrics.interToken.Observe(now.Sub(l.last).Seconds())
	}
	l.last = now
	if e.run.Cached > 0 || e.run.Computed > 0 { // it tells of the prompt, as the first of an attempt does
		l.g.metrics.computed.Add(float64(max(0, e.run.Computed)))
		l.g.metrics.cached.Add(float64(max(0, e.run.Cached)))
		l.g.metrics.prefixes.Add(float64(max(0, e.run.Cached) + max(0, e.run.Computed)))
		l.g.metrics.mmQueries.Add(float64(max(0, e.run.Pictures)))
		l.g.metrics.mmHits.Add(float64(max(0, e.run.Hits)))
	}
	after := l.answer.Tokens(e.run.Choice)
	l.g.metrics.generated.Add(float64(after - before))
	if after > l.job.expected {
		l.growCredit(max(before, l.job.expected), after)
	}
}

// measure takes note of how an answer that has ended well came along.
func (l *life) measure() {
	var each time.Duration
	if n := l.answer.Generated()/l.job.spec.Choices - 1; n > 0 {
		each = l.last.Sub(l.first) / time.Duration(n)
		if l.answer.Attempt() == 1 {
			l.g.paces.tokens(each)
		}
	}
	l.g.metrics.attained(l.objective, l.first.Sub(l.began), each)
	l.g.demand.ended(l.objective, time.Now(), l.answer.Generated(), l.job.spec.Choices, each)
}

// growCredit takes credit for KV slabs that a choice longer than expected has come to need.
func (l *life) growCredit(from, to int) {
	prompt := len(l.job.spec.Prompt)
	if slabs := kv.Slabs(prompt+to) - kv.Slabs(prompt+from); slabs > 0 {
		l.credit.Grow(admission.Bytes{KV: int64(slabs) * kv.SlabBytes(&l.g.model.Config.Text)})
	}
}

// deliver gives a piece to the client, and tells the stages of a choice that ended before they think it did.
func (l *life) deliver(p *request.Piece) {
	if l.outErr == nil {
		l.outErr = l.out.piece(p)
	}
	if p.Reason != request.ReasonNone && p.Word != "" && !l.answer.Done() {
		l.choiceDone(p.Choice)
	}
}

func (l *life) choiceDone(choice int) { l.done(wire.Done{Choice: choice}) }

// done tells everyone what of the request needs nothing any more.
func (l *life) done(m wire.Done) {
	m.Request = l.id
	if err := l.g.bus.Send(wire.SubjectDone, &m); err != nil {
		l.g.log.Warn("telling the end of a request, or of a part of it", "request", l.id, "error", err)
	}
}

// lost handles a stage's word that the attempt cannot go on.
func (l *life) lost(ctx context.Context, m *wire.Lost) error {
	if m.Attempt != l.answer.Attempt() {
		return nil
	}
	if m.Final {
		return l.died(m)
	}
	if m.NoRoom {
		return l.yield(ctx, m.Why)
	}
	return l.restart(ctx, m.Stage, m.Why)
}

// restart begins the next attempt where the client's answer stands. stage is whose word it is that this one is lost, if it is one's.
func (l *life) restart(ctx context.Context, stage, why string) error {
	failed := l.answer.Attempt() - l.yielded
	if failed >= l.g.cfg.Attempts {
		e := openai.Server(http.StatusServiceUnavailable, "The request failed after %d attempts: %s.", l.g.cfg.Attempts, why)
		return &death{e, wire.DeadAttempts, stage, failed}
	}
	l.g.log.Info("starting a request again", "request", l.id, "attempt", l.answer.Attempt()+1, "why", why)
	l.g.metrics.attempts.Inc()
	// What broke one attempt may take a moment to be seen by everyone; an HMM that is lost in this time is not taken for
	// another failure.
	select {
	case <-time.After(time.Duration(failed) * 50 * time.Millisecond):
	case <-ctx.Done():
		return ctx.Err()
	}
	l.next()
	return l.start(ctx)
}

// next makes the spec that of the next attempt.
func (l *life) next() {
	l.done(wire.Done{Choice: -1, Attempt: l.answer.Attempt()}) // whoever still works on it stops
	l.job.spec.Resume = l.answer.Restart()
	l.setGap(false)
	for choice := range l.job.spec.Choices {
		if l.answer.Over(choice) {
			l.choiceDone(choice)
		}
	}
}

// start publishes the attempt's first messages, once the HMM is there.
func (l *life) start(ctx context.Context) error {
	for exhausted := time.Duration(0); ; {
		memory, err := l.g.memory.get(ctx)
		if err != nil {
			return err
		}
		l.memory = memory
		err = l.publish(ctx)
		switch {
		case errors.Is(err, mem.ErrLost): // nothing was published yet: the same attempt goes to the next connection
		case errors.Is(err, mem.ErrExhausted):
			if exhausted >= l.g.cfg.QueueWait {
				return openai.Overloaded(time.Second, "no room for its pictures: %v", err)
			}
			exhausted += exhaustedWait
			select {
			case <-time.After(exhaustedWait):
			case <-ctx.Done():
				return ctx.Err()
			}
		default:
			return err
		}
	}
}

// exhaustedWait is the time between two tries to get host memory.
const exhaustedWait = 200 * time.Millisecond

// publish puts the attempt's objects into host memory and its messages on the bus.
func (l *life) publish(ctx context.Context) error {
	spec := &l.job.spec
	inline, err := wire.MarshalSpec(spec)
	if err != nil {
		return err
	}
	if most := maxPictures(l.memory.Node()); len(spec.Pictures) > most {
		return openai.Invalid("messages", "A request can have at most %d pictures; this one has %d.", most, len(spec.Pictures))
	}
	blobs, place := l.blobs(inline)
	var handles []mem.Handle
	if len(blobs) > 0 {
		hold := Hold{Request: l.id, Attempt: l.answer.Attempt(), Left: time.Until(l.deadline)}
		if handles, err = l.memory.Put(ctx, hold, blobs); err != nil {
			return fmt.Errorf("putting %d objects into host memory: %w", len(blobs), err)
		}
	}
	m := wire.Prefill{Request: l.wireRequest(), Inline: inline, Place: l.objective.place(l.began)}
	if blobs != nil && blobs[0].Kind == mem.KindSpec {
		m.Inline, m.Spec = nil, &handles[0]
	}
	if len(spec.Pictures) == 0 {
		id := fmt.Sprintf("%s.%d.p", l.id, l.answer.Attempt())
		return l.g.bus.PublishWithin(ctx, l.g.cfg.StoreWait, "prefill", l.id, id, &m)
	}
	key := wire.JoinKey(l.id, l.answer.Attempt())
	l.joins = append(l.joins, key)
	m.MM = make([]mem.Handle, len(spec.Pictures))
	// Whatever becomes of the client, the record is not given up while it is being made: it would be stored after it was
	// deleted.
	making, cancel := context.WithCancel(context.WithoutCancel(ctx))
	unhook := context.AfterFunc(ctx, func() { time.AfterFunc(endWait, cancel) })
	err = l.g.bus.CreateJoinWithin(making, l.g.cfg.StoreWait, key, &wire.Join{Prefill: m, Have: make([]bool, len(spec.Pictures))})
	unhook()
	cancel()
	if err != nil {
		return err
	}
	for i := range spec.Pictures {
		id := fmt.Sprintf("%s.%d.e.%d", l.id, l.answer.Attempt(), i)
		e := wire.Encode{Request: l.wireRequest(), Part: i, Pixels: handles[place[i]], Grid: spec.Pictures[i].Grid,
			Content: spec.Pictures[i].Content, Model: spec.Model, Salt: spec.Salt}
		if err := l.g.bus.PublishWithin(ctx, l.g.cfg.StoreWait, "encode", l.id, id, &e); err != nil {
			return err
		}
	}
	return nil
}

// blobs lists what goes into host memory: the spec, first, if it is too large for messages or for a join record beside
// this many handles, and each distinct picture. place is the blob of each picture.
func (l *life) blobs(spec []byte) (blobs []Blob, place []int) {
	if len(spec) > wire.MaxInline || joinSize(len(spec), len(l.job.pictures), l.memory.Node()) > wire.MaxMessage {
		blobs = append(blobs, Blob{Kind: mem.KindSpec, Data: spec})
	}
	at := make(map[*picture]int)
	for _, p := range l.job.pictures {
		i, ok := at[p]
		if !ok {
			i = len(blobs)
			at[p] = i
			blobs = append(blobs, Blob{Kind: mem.KindPixels, Data: p.data})
		}
		place = append(place, i)
	}
	return blobs, place
}

// joinSize is at least the size of a join record once all handles are filled in, in bytes: handles of MM objects are
// three numbers of 9 bytes, a shape of three, and a capability.
func joinSize(spec, pictures int, node string) int {
	const fixed, each = 512 + maxTenant, 128
	return fixed + spec + pictures*(each+len(node))
}

// maxPictures is the most pictures whose join record fits a message, with the spec by handle.
func maxPictures(node string) int {
	return (wire.MaxMessage - joinSize(0, 0, node)) / (joinSize(0, 1, node) - joinSize(0, 0, node))
}

func (l *life) wireRequest() wire.Request {
	return wire.Request{ID: l.id, Attempt: l.answer.Attempt(), Gateway: l.g.cfg.Instance, Left: time.Until(l.deadline)}
}

// watchGaps starts asking for missing tokens, or stops it.
func (l *life) watchGaps() {
	gap := false
	for c := range l.job.spec.Choices {
		_, _, missing := l.answer.Gap(c)
		gap = gap || missing
	}
	l.setGap(gap)
}

func (l *life) setGap(gap bool) {
	switch {
	case !gap:
		l.resend.Stop()
		l.resendAfter = 0
	case l.resendAfter == 0:
		l.resendAfter = l.g.cfg.ResendWait
		l.askAgain()
	}
}

// maxResendWait bounds the time between two questions for the same tokens.
const maxResendWait = 2 * time.Second

// askAgain asks for every missing token, and sees to it that it is asked again later.
func (l *life) askAgain() {
	for c := range l.job.spec.Choices {
		from, instance, missing := l.answer.Gap(c)
		if !missing {
			continue
		}
		l.g.metrics.resends.Inc()
		m := wire.Resend{Request: l.id, Choice: c, From: from}
		if err := l.g.bus.Send(wire.SubjectResend(instance), &m); err != nil {
			l.g.log.Warn("asking for tokens again", "request", l.id, "error", err)
		}
	}
	l.resend.Reset(l.resendAfter)
	l.resendAfter = min(2*l.resendAfter, maxResendWait)
}

// settleWait is the time between the last confirmation and the end of the request: a decoder acks after it was
// confirmed, and the end of the request takes its claim, without which it must not ack.
const settleWait = 20 * time.Millisecond

// linger answers decoders that ask whether the end of their choice has arrived: a request is declared done only after
// (DESIGN.md, "The path of a request", 5). It is not waited for long, as a decoder may have died in this moment.
func (l *life) linger() {
	timeout := time.NewTimer(l.g.cfg.ConfirmWait)
	defer timeout.Stop()
	for l.answer.Owed() {
		select {
		case <-l.box.wake:
		case <-timeout.C:
			return
		case <-l.g.base.Done():
			return
		}
		events := l.box.take(l.spare)
		l.spare = events
		for i := range events {
			if e := &events[i]; e.confirm != nil {
				c := l.answer.Confirm(e.confirm, func(*request.Piece) {})
				l.g.dispatch.answer(e.reply, &c)
			}
		}
	}
	select {
	case <-time.After(settleWait):
	case <-l.g.base.Done():
	}
}

// end tells everyone that the request needs nothing any more.
func (l *life) end(released func()) {
	l.g.dispatch.close(l.id)
	l.done(wire.Done{Choice: -1})
	memory, joins, id := l.memory, l.joins, l.id
	l.g.background.Go(func() {
		if memory != nil {
			ctx, cancel := context.WithTimeout(context.Background(), endWait)
			if err := memory.End(ctx, id); err != nil && !errors.Is(err, mem.ErrLost) {
				l.g.log.Warn("ending a request's memory", "request", id, "error", err)
			}
			cancel()
		}
		released()
		l.g.deleteJoins(joins)
	})
}

// endWait bounds the time that the end of a request may take; what it leaves expires by itself.
const endWait = 5 * time.Second
