// Package scaler decides how many NPUs each stage has, and has that done: the service behind `trireme scaler run`.
//
//	gateways, stages, HMMs, queues ──> signals ──> decide (autoscale.State) ──> act, if this scaler leads (lead) and the mode is auto
//	                                      │              │                        │
//	                                      └── record     └── events (explain) <───┘
//
// One goroutine asks, decides and tells, once a second; what is to be done the goroutine of lead does beside it.
package scaler

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/scaler/act"
	"trireme.dev/services/scaler/decide"
	"trireme.dev/services/scaler/explain"
	"trireme.dev/services/scaler/lead"
	"trireme.dev/services/scaler/record"
	"trireme.dev/services/scaler/signals"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/obs"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// Config of a scaler.
type Config struct {
	NATSURL  string
	AckWait  time.Duration // as bus.WithAckWait; 0: the default
	Replicas int           // as bus.WithReplicas

	Mode   autoscale.Mode // stands above the policy's; "": as that says
	Policy string         // file; "": the default policy
	// Record is the file that what is seen and decided is written to; "": none. RecordSize is its size when the next one is begun; 0:
	// record.DefaultSize.
	Record     string
	RecordSize int64
	Metrics    string        // address for /metrics, /live and /health; "": none
	Lease      time.Duration // as lead.Config; 0: the default
	Settle     time.Duration // as decide.Options; 0: the default

	// Anywhere says that processes can be started and stopped on all nodes (act.Processes.Anywhere).
	Anywhere bool
	// Actuator makes who carries changes out.
	Actuator func(*bus.Bus, *slog.Logger) (act.Actuator, error)
}

const (
	every      = time.Second            // between two decisions
	ableWait   = 2 * time.Second        // for an actuator that says whether it can make a change
	againWait  = time.Second            // until an operation of which nobody knows how it ended is asked for again
	readyFor   = 5 * time.Second        // since the last decision: longer, and the process is not ready
	lookWait   = 2 * time.Second        // for the events of a predecessor
	lately     = time.Minute            // so long after it should have been measured an outcome is not any more
	policyWait = 500 * time.Millisecond // between two looks at the policy file, which come with decisions
)

// service is one scaler. What is not said otherwise belongs to the goroutine of run.
type service struct {
	cfg      Config
	id       string
	log      *slog.Logger
	began    time.Time
	bus      *bus.Bus
	asker    *signals.Asker
	book     *signals.Book
	desk     *decide.Desk
	policy   policyFile
	looked   time.Time // at the policy
	record   *record.Writer
	unheard  bool // the record could not be written, which was said
	actuator act.Actuator
	metrics  *metrics

	inbox chan func()          // for the goroutine of run, from others
	ops   chan *lead.Operation // for the goroutine of the term
	leads bool
	turns uint64

	mu     sync.Mutex
	status explain.Status // for whoever asks
	turned time.Time      // when it was made
}

// Run decides until ctx ends. A policy file that cannot be used when it begins is an error that wraps autoscale.ErrPolicy.
func Run(ctx context.Context, cfg Config, log *slog.Logger) error {
	s := &service{
		cfg: cfg, id: "scaler-" + strings.ToLower(rand.Text()[:8]), log: log, began: time.Now(), book: signals.NewBook(), metrics: newMetrics(),
		policy: policyFile{name: cfg.Policy, mode: cfg.Mode}, inbox: make(chan func()), ops: make(chan *lead.Operation, 1),
	}
	s.log = log.With("instance", s.id)
	p, _, err := s.policy.load()
	if err != nil {
		return err
	}
	s.desk = decide.New(p, decide.Options{Scaler: s.id, NewID: bus.NewChangeID, Settle: cfg.Settle})
	if s.bus, err = bus.Connect(ctx, cfg.NATSURL, s.id, log, bus.WithAckWait(cfg.AckWait), bus.WithReplicas(cfg.Replicas)); err != nil {
		return err
	}
	defer s.bus.Close()
	if s.actuator, err = cfg.Actuator(s.bus, s.log); err != nil {
		return err
	}
	if s.asker, err = signals.NewAsker(ctx, s.bus, s.now, s.log); err != nil {
		return err
	}
	defer s.asker.Wait()
	s.asker.Anywhere = cfg.Anywhere
	if cfg.Record != "" {
		most := cfg.RecordSize
		if most == 0 {
			most = record.DefaultSize
		}
		if s.record, err = record.Create(cfg.Record, most, s.id, p, time.Now); err != nil {
			return err
		}
		defer s.record.Close() //nolint:errcheck // it is written line by line
	}
	if cfg.Metrics != "" {
		if _, err := obs.Serve(ctx, cfg.Metrics, s.metrics.registry, s.ready, s.log); err != nil {
			return err
		}
	}
	sub, err := s.answer()
	if err != nil {
		return err
	}
	defer sub.Unsubscribe() //nolint:errcheck // it ends with the connection at the latest
	return s.run(ctx)
}

// now is the time that everything of this scaler is told by.
func (s *service) now() time.Duration { return time.Since(s.began) }

// answer answers whoever asks what the scaler thinks.
func (s *service) answer() (*nats.Subscription, error) {
	sub, err := s.bus.Conn().Subscribe(wire.SubjectScaler, func(m *nats.Msg) {
		s.mu.Lock()
		data, err := json.Marshal(&s.status)
		s.mu.Unlock()
		if err == nil {
			err = m.Respond(data)
		}
		if err != nil {
			s.log.Debug("answering for the scaler's status", "error", err)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("listening for questions: %w", err)
	}
	return sub, nil
}

func (s *service) ready() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.turned.IsZero() && time.Since(s.turned) < readyFor
}

// run turns once a second, and leads or follows beside that.
func (s *service) run(ctx context.Context) error {
	leading, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		ended <- lead.Run(leading, lead.Config{Bus: s.bus, ID: s.id, Lease: s.cfg.Lease, Log: s.log}, s.term)
	}()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case f := <-s.inbox:
			f()
		case <-tick.C:
			s.turn(ctx)
		case err := <-ended: // of itself, or because ctx has ended
			return err
		}
	}
}

// tell has the goroutine of run call f, unless that has ended.
func (s *service) tell(ctx context.Context, f func()) {
	done := make(chan struct{})
	select {
	case s.inbox <- func() { f(); close(done) }:
		<-done
	case <-ctx.Done():
	}
}

// term is one time of leading: first what a predecessor has begun, then what is decided. It runs on the goroutine of lead.
func (s *service) term(ctx context.Context, t *lead.Term) error {
	left, told := t.Pending(), s.lastOutcome(ctx)
	s.tell(ctx, func() {
		s.leads = true
		s.desk.Await(s.now(), told)
		l := explain.Lead{Scaler: s.id}
		if left != nil {
			l.Operation, l.Change = left.ID, &left.Change
			s.desk.Adopt(left.ID, left.Change)
		}
		s.bus.Emit(explain.LeadEvent(l))
	})
	// The goroutine of run is there until lead.Run has returned, also when ctx has ended.
	defer s.tell(context.WithoutCancel(ctx), func() {
		s.leads = false
		select {
		case <-s.ops:
			s.emit(s.desk.Ended(s.now(), decide.Result{Why: "it was not begun: " + lead.ErrDeposed.Error()}))
		default:
		}
		s.desk.Drop()
	})
	if left != nil {
		s.perform(ctx, t, left)
	}
	for {
		select {
		case op := <-s.ops:
			err := t.Note(ctx, op)
			if err != nil { // a successor sees whether it stands there
				s.log.Warn("a change is not begun", "operation", op.ID, "error", err)
				return nil
			}
			s.perform(ctx, t, op)
		case <-ctx.Done():
			return nil
		}
	}
}

// lastOutcome is the last outcome that was told lately, by whatever scaler: of a change that was made, and of which nobody has said what came
// of it, this one is to say that.
func (s *service) lastOutcome(ctx context.Context) (last explain.Outcome) {
	ctx, cancel := context.WithTimeout(ctx, lookWait)
	defer cancel()
	q := bus.EventQuery{Kinds: []string{wire.EventScalerOutcome}, Since: cmp.Or(s.cfg.Settle, decide.Settle) + lately}
	err := s.bus.Events(ctx, q, func(e wire.Event) error {
		var o explain.Outcome
		if json.Unmarshal(e.Data, &o) == nil && o.Made { // one that failed does not end the wait of the one before
			last = o
		}
		return nil
	})
	if err != nil {
		s.log.Debug("it is not known whether an outcome waits to be measured", "error", err)
		return explain.Outcome{}
	}
	return last
}

// perform has an operation carried out that stands in the record, and takes it out of there. When the term ends before that it is the
// successor's.
func (s *service) perform(ctx context.Context, t *lead.Term, op *lead.Operation) {
	began := time.Now()
	out, err := s.actuator.Do(ctx, t, op)
	for err != nil {
		if ctx.Err() != nil || errors.Is(err, lead.ErrDeposed) {
			return
		}
		s.log.Warn("it is not known how a change has ended; it is asked for again", "operation", op.ID, "error", err)
		select {
		case <-time.After(againWait):
		case <-ctx.Done():
			return
		}
		out, err = s.actuator.Do(ctx, t, op)
	}
	if err := t.Note(ctx, nil); err != nil {
		s.log.Warn("a change that has ended is not taken out of the record; the next leader does", "operation", op.ID, "error", err)
		return
	}
	s.tell(context.WithoutCancel(ctx), func() {
		result := map[bool]string{true: "made", false: "failed"}[out.Done]
		s.metrics.changes.WithLabelValues(string(op.Change.Action), result).Inc()
		s.emit(s.desk.Ended(s.now(), decide.Result{Made: out.Done, Why: out.Why, Took: time.Since(began), Bytes: out.Bytes}))
	})
}

func (s *service) emit(events []wire.Event) {
	for _, e := range events {
		s.log.Info(e.Text, "event", e.Kind)
		s.bus.Emit(e)
	}
}

// turn asks, decides, tells, and has it done.
func (s *service) turn(ctx context.Context) {
	if ctx.Err() != nil {
		return
	}
	s.reload()
	s.book.Hear(s.asker.Ask(ctx))
	if ctx.Err() != nil {
		return
	}
	p := s.desk.Policy()
	now := s.now()
	v := s.book.View(now, p.Targets)
	t := s.desk.Turn(&v, s.leads, func(c autoscale.Change) (string, bool) {
		ctx, cancel := context.WithTimeout(ctx, ableWait)
		defer cancel()
		return s.actuator.Able(ctx, c)
	})
	for i := range t.Events {
		if t.Events[i].Kind == wire.EventScalerDecision { // advice that is not news is none
			result := map[bool]string{true: "begun", false: "advised"}[t.Do != ""]
			s.metrics.decisions.WithLabelValues(string(t.Decision.Change.Action), result).Inc()
		}
	}
	s.emit(t.Events)
	if t.Do != "" {
		s.ops <- &lead.Operation{ID: t.Do, Change: t.Decision.Change} // there is room: one is under way at a time
	}
	s.write(&v, &t.Decision)
	s.turns++
	status := explain.Status{
		Scaler: s.id, Leads: s.leads, Mode: p.Mode, Policy: s.cfg.Policy, Refused: s.policy.bad, Turns: s.turns, Pending: s.book.Pending(now),
		UnderWay: s.desk.UnderWay(), Decision: t.Decision, Measured: explain.Measure(&v, &t.Decision), Ages: explain.AgesOf(&v), Queues: v.Queues,
	}
	s.metrics.tell(&status)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status, s.turned = status, time.Now()
}

// reload has another policy in force when its file has changed and can be used.
func (s *service) reload() {
	if s.cfg.Policy == "" || time.Since(s.looked) < policyWait {
		return
	}
	s.looked = time.Now()
	p, changed, err := s.policy.load()
	if !changed {
		return
	}
	told := explain.Policy{Scaler: s.id, File: s.cfg.Policy, Mode: s.desk.Policy().Mode}
	if err != nil {
		s.metrics.refused.Inc()
		s.log.Warn("the policy cannot be used; the one before stays", "error", err)
		told.Refused = err.Error()
	} else {
		s.desk.SetPolicy(p)
		told.Mode = p.Mode
		if s.record != nil {
			s.unrecorded(s.record.SetPolicy(p))
		}
	}
	s.bus.Emit(explain.PolicyEvent(told))
}

// write records a view and its decision.
func (s *service) write(v *autoscale.View, d *autoscale.Decision) {
	if s.record != nil {
		s.unrecorded(s.record.Write(v, d))
	}
}

// unrecorded says that the record cannot be written, once until it can be again.
func (s *service) unrecorded(err error) {
	if err != nil && !s.unheard {
		s.log.Warn("what the scaler sees is not recorded; it is tried again", "error", err)
	}
	s.unheard = err != nil
}
