package gateway

import (
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/labstack/echo/v4"
	"golang.org/x/sync/errgroup"

	"trireme.dev/services/gateway/admission"
	"trireme.dev/services/gateway/openai"
)

// responder is one HTTP response in the making.
type responder interface {
	// output is where the choices of one job go; first is the index of its first choice. Outputs of different jobs may be
	// used at the same time.
	output(job *job, first int) output
	// finish sends what is left when every choice has ended.
	finish(usage *openai.Usage) error
	// fail sends an error if the response has begun, and reports whether it has.
	fail(e *openai.Error) bool
}

// chatCompletions is POST /v1/chat/completions.
func (g *Gateway) chatCompletions(c echo.Context) error {
	began := time.Now()
	body, err := g.body(c)
	if err != nil {
		return err
	}
	r, err := openai.DecodeChat(body)
	if err != nil {
		return err
	}
	if err := g.checkModel(r.Model); err != nil {
		return err
	}
	objective, err := g.objective(c.Request().Header, &r.Params)
	if err != nil {
		return err
	}
	ctx, deadline, cancel := g.requestContext(c, began)
	defer cancel()
	j, err := g.chatJob(ctx, r)
	if err != nil {
		return causeOr(ctx, err)
	}
	id := newID()
	params := r.Params // what else r holds need not live as long as the answer
	q := &query{g: g, params: &params, objective: objective, jobs: []*job{j}, id: id, began: began, deadline: deadline}
	q.kept = g.graveyard.keep(c, body)
	defer q.kept.release()
	return q.serve(ctx, q.responder(c, true, "chatcmpl-"+id))
}

// completions is POST /v1/completions.
func (g *Gateway) completions(c echo.Context) error {
	began := time.Now()
	body, err := g.body(c)
	if err != nil {
		return err
	}
	r, err := openai.DecodeCompletion(body)
	if err != nil {
		return err
	}
	if err := g.checkModel(r.Model); err != nil {
		return err
	}
	objective, err := g.objective(c.Request().Header, &r.Params)
	if err != nil {
		return err
	}
	ctx, deadline, cancel := g.requestContext(c, began)
	defer cancel()
	id := newID()
	params := r.Params
	q := &query{g: g, params: &params, objective: objective, id: id, began: began, deadline: deadline, echo: r.Echo}
	for i := range r.Prompts {
		j, err := g.completionJob(r, &r.Prompts[i])
		if err != nil {
			return err
		}
		q.jobs = append(q.jobs, j)
	}
	q.kept = g.graveyard.keep(c, body)
	defer q.kept.release()
	return q.serve(ctx, q.responder(c, false, "cmpl-"+id))
}

// causeOr is why ctx ended, or err if it has not.
func causeOr(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// query is one HTTP request with all its jobs.
type query struct {
	g        *Gateway
	params   *openai.Params
	jobs     []*job
	id       string // of the first job, and so of the answer
	echo     bool   // answers begin with the prompt
	began    time.Time
	deadline time.Time

	objective objective
	kept      *kept

	mu    sync.Mutex
	usage openai.Usage
}

func (q *query) responder(c echo.Context, chat bool, id string) responder {
	if q.params.Stream {
		return newStream(q, c.Response(), chat, id)
	}
	return newCollected(q, c.Response(), chat, id)
}

// serve takes credits, runs the jobs and finishes the response.
func (q *query) serve(ctx context.Context, r responder) error {
	err := q.runAll(ctx, r)
	if err == nil {
		err = r.finish(&q.usage)
	}
	if err == nil {
		q.g.metrics.e2e.Observe(time.Since(q.began).Seconds())
		return nil
	}
	q.bury(err)
	if e := q.g.toError(err); e != nil && r.fail(e) {
		q.g.log.Warn("request failed in mid-stream", "request", q.id, "error", err)
	}
	return err
}

// runAll takes credits for all jobs together, so that jobs of one request never wait for each other, and runs them.
func (q *query) runAll(ctx context.Context, r responder) error {
	g := q.g
	if err := g.awaitHeartbeat(ctx); err != nil {
		return causeOr(ctx, err)
	}
	if g.rooms.Load() == nil { // who connects to the HMM asks it for the sizes first
		if _, err := g.memory.get(ctx); err != nil {
			return causeOr(ctx, err)
		}
	}
	for _, j := range q.jobs {
		if err := g.bound(j, q.params); err != nil {
			return err
		}
	}
	for _, j := range q.jobs {
		defer g.demand.arrived(j, &q.objective, q.began)()
	}
	waiting := time.Now()
	credit, err := g.gate.Acquire(ctx, g.request(q.jobs, q.objective, q.began))
	var refusal *admission.Refusal
	switch {
	case errors.As(err, &refusal):
		g.metrics.refused.WithLabelValues(q.objective.class, string(refusal.Reason)).Inc()
		for _, j := range q.jobs {
			g.demand.refused(j.arrival, time.Now())
		}
		return overloaded(refusal, &q.objective)
	case err != nil:
		return causeOr(ctx, err)
	}
	g.metrics.queued.WithLabelValues(q.objective.class).Observe(time.Since(waiting).Seconds())
	if len(q.jobs) == 1 {
		return q.run(ctx, r, 0, credit)
	}
	group, ctx := errgroup.WithContext(ctx)
	for i, j := range q.jobs {
		own := credit.Split(1, j.tokens(), g.need(j))
		group.Go(func() error { return q.run(ctx, r, i, own) })
	}
	return group.Wait()
}

// run runs one job. Its credit comes back when the HMM knows of its end.
func (q *query) run(ctx context.Context, r responder, i int, credit *admission.Credit) error {
	j, id := q.jobs[i], q.id
	if i > 0 {
		id = newID()
	}
	m := q.g.metrics
	m.prompt.Add(float64(len(j.spec.Prompt)))
	m.pictures.Add(float64(len(j.pictures)))
	l := q.g.newLife(j, q.params, id, q.deadline, q.began, r.output(j, i*q.params.N))
	l.credit, l.objective, l.admitted = credit, &q.objective, time.Now()
	if err := l.run(ctx, credit.Release); err != nil {
		return err
	}
	l.measure()
	cached, _ := l.answer.Prompt()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.usage.Add(len(j.spec.Prompt), l.answer.Generated(), min(cached, len(j.spec.Prompt)))
	if len(j.pictures) > 0 {
		q.usage.AddPictures(min(l.answer.Hits(), len(j.pictures)))
	}
	return nil
}

// awaitHeartbeat waits until the gateway's heartbeat stands, once: stages give up requests of a gateway that has none.
func (g *Gateway) awaitHeartbeat(ctx context.Context) error {
	for !g.announced.Load() {
		changed := g.instances.Changed()
		for _, i := range g.instances.Role("gateway") {
			if i.ID == g.cfg.Instance {
				g.announced.Store(true)
				return nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// writer writes to a client that must read.
type writer struct {
	w     http.ResponseWriter // takes the header
	body  flusher             // takes the rest: what w writes to, where that is known
	wait  time.Duration
	until time.Time // the connection's deadline
}

// flusher is what net/http's response writers are.
type flusher interface {
	io.Writer
	FlushError() error
	SetWriteDeadline(time.Time) error
}

func newWriter(w http.ResponseWriter, wait time.Duration) writer {
	inner := w
	if r, ok := w.(*echo.Response); ok { // which only notes what has been written
		inner = r.Writer
	}
	body, ok := inner.(flusher)
	if !ok {
		body = wrapped{w, http.NewResponseController(w)}
	}
	return writer{w: w, body: body, wait: wait}
}

// wrapped is a response writer around others.
type wrapped struct {
	http.ResponseWriter
	control *http.ResponseController
}

// FlushError implements flusher.
func (w wrapped) FlushError() error { return w.control.Flush() }

// SetWriteDeadline implements flusher.
func (w wrapped) SetWriteDeadline(t time.Time) error { return w.control.SetWriteDeadline(t) }

// deadlineStep is how much longer than asked for a client may read nothing: moving the deadline for every token would cost as
// much as making its event does.
const deadlineStep = time.Second

// write writes and flushes. The header has been written. Its error wraps errClient.
func (w *writer) write(b []byte) error {
	if now := time.Now(); w.until.Sub(now) < w.wait {
		w.until = now.Add(w.wait + min(deadlineStep, w.wait))
		_ = w.body.SetWriteDeadline(w.until) // a writer without deadlines cannot be a client's connection
	}
	if _, err := w.body.Write(b); err != nil {
		return errors.Join(errClient, err)
	}
	if err := w.body.FlushError(); err != nil {
		return errors.Join(errClient, err)
	}
	return nil
}
