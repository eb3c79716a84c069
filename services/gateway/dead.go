package gateway

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/labstack/echo/v4"

	"trireme.dev/services/gateway/openai"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/wire"
)

// What Config.DeadLetters says.
const (
	DeadWhole = "whole" // letters with their requests
	DeadFacts = "facts" // letters alone
	DeadOff   = "off"
)

// death is an error that ends a request for good and is not its client's fault: the request becomes a dead letter. The client is
// told what it wraps.
type death struct {
	api      *openai.Error
	reason   string // a wire.Dead constant
	stage    string
	attempts int
}

// Error implements error.
func (d *death) Error() string { return d.api.Error() }

// Unwrap is what the client is told.
func (d *death) Unwrap() error { return d.api }

// died makes the final word of a stage a death, if it is not the client's fault.
func (l *life) died(m *wire.Lost) error {
	e := l.job.fault(m)
	if e.Status < 500 {
		return e
	}
	d := &death{e, wire.DeadFault, m.Stage, l.answer.Attempt()}
	if m.Code == wire.CodeQuarantined {
		d.reason = wire.DeadQuarantined
	}
	return d
}

// Bounds of what is kept for dead letters, so that a storm of failures fills neither memory nor NATS: what is over them is left out
// and counted.
const (
	deadBytes = 256 << 20       // of requests in work and of those being stored
	deadQueue = 256             // letters being stored
	deadTime  = 2 * time.Minute // for storing one, from the end of its request on
	deadRetry = time.Second     // the pause before it is tried again
	deadError = 4 << 10         // bytes of an error's text
	deadURL   = 64              // bytes of a picture's URL
	deadReply = 64              // bytes of the id of the letter that a request is a replay of
)

// graveyard stores dead letters behind the back of requests.
type graveyard struct {
	g     *Gateway
	bytes atomic.Int64
	queue atomic.Int32
	turn  chan struct{} // has room for the one that stores
}

// kept is what is kept of an HTTP request until it has ended well.
type kept struct {
	yard  *graveyard
	bytes int64 // taken of the yard's

	path, trace, replayOf string
	headers               map[string]string
	body                  []byte // nil: it is not kept, for the reason in missing
	missing               string
}

// keep takes a request's body in custody; its caller releases it.
func (y *graveyard) keep(c echo.Context, body []byte) *kept {
	r := c.Request()
	k := &kept{yard: y, path: r.URL.Path, trace: c.Response().Header().Get(echo.HeaderXRequestID),
		replayOf: cut(r.Header.Get(wire.HeaderReplayOf), deadReply)}
	for _, name := range slices.Concat(headersTenant, headersClass, headersTTFT, headersTPOT) {
		if v := r.Header.Get(name); v != "" {
			if k.headers == nil {
				k.headers = make(map[string]string)
			}
			k.headers[name] = v
		}
	}
	switch {
	case y.g.cfg.DeadLetters != DeadWhole:
		k.missing = "the gateway keeps no requests (--dead-letters)"
	case !k.take(len(body)):
		k.missing = "too many requests were in work at once to keep them all"
	default:
		k.body = body
	}
	return k
}

// take takes so many bytes of the yard's for k, if there are as many.
func (k *kept) take(n int) bool {
	if k.yard.bytes.Add(int64(n)) > deadBytes {
		k.yard.bytes.Add(-int64(n))
		return false
	}
	k.bytes += int64(n)
	return true
}

// release lets go of the body.
func (k *kept) release() {
	k.yard.bytes.Add(-k.bytes)
	k.bytes, k.body = 0, nil
}

// cut is the beginning of a text.
func cut(s string, most int) string {
	if len(s) > most {
		return s[:most]
	}
	return s
}

// bury has a request stored as a dead letter if err is a death, and takes over what was kept of it. It does not wait.
func (q *query) bury(err error) {
	g, k := q.g, q.kept
	var d *death
	if g.cfg.DeadLetters == DeadOff || !errors.As(err, &d) {
		return
	}
	y := g.graveyard
	if y.queue.Add(1) > deadQueue {
		y.queue.Add(-1)
		g.metrics.unburied.WithLabelValues("letter").Inc()
		return
	}
	now := time.Now()
	l := &wire.DeadLetter{
		ID: bus.NewDeadID(now), Time: now.UTC(), Reason: d.reason,
		Trace: k.trace, Request: q.id, Tenant: q.objective.tenant, Class: q.objective.class, Model: g.name, Gateway: g.cfg.Instance,
		Stage: d.stage, Attempts: d.attempts, Status: d.api.Status, Code: d.api.Code, Error: cut(d.Error(), deadError),
		ReplayOf: k.replayOf, Path: k.path, Stream: q.params.Stream, Headers: k.headers, Missing: k.missing,
	}
	for _, j := range q.jobs {
		l.PromptTokens += len(j.spec.Prompt)
		l.Pictures += len(j.pictures)
	}
	if q.params.Seed == nil && len(q.jobs) == 1 {
		l.Seed = int64(q.jobs[0].spec.Sampling.Seed) // as the API has it
	}
	var pictures [][]byte
	if k.body != nil {
		for _, j := range q.jobs {
			for _, p := range j.fetched {
				if !k.take(len(p.data)) {
					l.Missing, l.Fetched, pictures, k.body = "too many requests failed at once to keep them all", nil, nil, nil
					break
				}
				l.Fetched = append(l.Fetched, wire.DeadPicture{URL: cut(p.url, deadURL), Bytes: int64(len(p.data))})
				pictures = append(pictures, p.data)
			}
		}
	}
	own := *k // the caller's release finds nothing
	k.bytes, k.body = 0, nil
	g.background.Go(func() {
		defer y.queue.Add(-1)
		defer own.release()
		y.store(l, own.body, pictures)
	})
}

// store stores a letter, when those before it are stored.
func (y *graveyard) store(l *wire.DeadLetter, body []byte, pictures [][]byte) {
	ctx, cancel := context.WithTimeout(context.Background(), deadTime)
	defer cancel()
	defer context.AfterFunc(y.g.base, func() { time.AfterFunc(endWait, cancel) })()
	err := y.storeWithin(ctx, l, body, pictures)
	log := y.g.log.With("letter", l.ID, "reason", l.Reason, "request", l.Request, "trace", l.Trace)
	if err != nil && !errors.Is(err, bus.ErrFull) {
		y.g.metrics.unburied.WithLabelValues("letter").Inc()
		log.Error("a dead letter could not be stored", "error", err)
		return
	}
	if l.Body == 0 && y.g.cfg.DeadLetters == DeadWhole {
		y.g.metrics.unburied.WithLabelValues("request").Inc()
	}
	y.g.metrics.dead.WithLabelValues(l.Reason).Inc()
	log.Warn("a request has failed for good; see trireme dead", "error", l.Error)
	y.g.bus.Emit(wire.Event{Kind: wire.EventDead, Node: y.g.node, Instance: l.Gateway, Role: "gateway", Request: l.Request,
		Text: fmt.Sprintf("failed for good (%s), kept as dead letter %s", l.Reason, l.ID)})
}

func (y *graveyard) storeWithin(ctx context.Context, l *wire.DeadLetter, body []byte, pictures [][]byte) error {
	select {
	case y.turn <- struct{}{}:
		defer func() { <-y.turn }()
	case <-ctx.Done():
		return fmt.Errorf("waiting for those before: %w", ctx.Err())
	}
	for {
		err := y.g.bus.Bury(ctx, l, body, pictures)
		if err == nil || errors.Is(err, bus.ErrFull) || ctx.Err() != nil {
			return err
		}
		select {
		case <-time.After(deadRetry):
		case <-ctx.Done():
			return err
		}
	}
}
