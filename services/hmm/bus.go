package hmm

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/hmm/ledger"
	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/wire"
)

// SubjectStats is where the HMM of one node answers with its stats; wire.SubjectHMM reaches those of all nodes.
func SubjectStats(node string) string { return "trireme.hmm." + node + ".stats" }

// subscriptions are the daemon's ears on NATS.
type subscriptions []*nats.Subscription

// join subscribes to what concerns the HMM; nothing without NATS.
func (d *Daemon) join() (subscriptions, error) {
	if d.cfg.NATS == nil {
		return nil, nil
	}
	var subs subscriptions
	for subject, handle := range map[string]nats.MsgHandler{
		wire.SubjectDone:         d.onDone,
		wire.SubjectHMM:          d.onStats,
		wire.SubjectReach:        d.onReach,
		SubjectStats(d.cfg.Node): d.onStats,
		subjectName(d.cfg.Node):  d.onName,
	} {
		sub, err := d.cfg.NATS.Subscribe(subject, handle)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("subscribing to %s: %w", subject, err), subs.leave())
		}
		subs = append(subs, sub)
	}
	if err := d.cfg.NATS.Flush(); err != nil { // when the daemon is ready, it hears
		return nil, errors.Join(fmt.Errorf("subscribing: %w", err), subs.leave())
	}
	return subs, nil
}

// leave ends the subscriptions. That the connection is closed already is no error.
func (subs subscriptions) leave() error {
	var errs []error
	for _, sub := range subs {
		if err := sub.Unsubscribe(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
			errs = append(errs, fmt.Errorf("unsubscribing from %s: %w", sub.Subject, err))
		}
	}
	return errors.Join(errs...)
}

// onDone follows the ends of requests and of attempts. The end of one choice frees nothing: its memory is its decoder's.
func (d *Daemon) onDone(m *nats.Msg) {
	var done wire.Done
	if err := wire.Unmarshal(m.Data, &done); err != nil {
		d.log.Warn("done event", "error", err)
		return
	}
	if done.Choice >= 0 {
		return
	}
	if done.Attempt > 0 {
		d.books.do(func(l *ledger.Ledger, now time.Time) { l.EndAttempts(now, done.Request, done.Attempt) })
		return
	}
	if err := d.End(done.Request); err != nil {
		d.log.Warn("done event", "error", err)
	}
}

func (d *Daemon) onStats(m *nats.Msg) {
	text, err := json.Marshal(d.Stats())
	if err == nil {
		err = m.Respond(text)
	}
	if err != nil {
		d.log.Warn("answering for stats", "error", err)
	}
}

// onReach tells another node how much of a prompt is cached here.
func (d *Daemon) onReach(m *nats.Msg) {
	var q wire.Reach
	if err := wire.Unmarshal(m.Data, &q); err != nil {
		d.log.Warn("a question for a prompt", "error", err)
		return
	}
	keys := make([]protocol.Key, len(q.Keys))
	for i, k := range q.Keys {
		copy(keys[i][:], k)
	}
	out := wire.Reached{Node: d.cfg.Node}
	d.books.do(func(l *ledger.Ledger, _ time.Time) { out.Count = l.Reach(q.Role, keys) })
	data, err := wire.Marshal(&out)
	if err == nil {
		err = m.Respond(data)
	}
	if err != nil {
		d.log.Warn("answering for a prompt", "error", err)
	}
}

// publish announces a gone instance. When it fails, those who start ask for orphans and the rest notice by AckWait.
func (d *Daemon) publish(g wire.Gone) {
	if d.cfg.NATS == nil {
		return
	}
	data, err := wire.Marshal(g)
	if err == nil {
		err = d.cfg.NATS.Publish(wire.SubjectGone, data)
	}
	if err != nil {
		d.log.Error("announcing a gone instance", "instance", g.Instance, "error", err)
	}
	d.emit(wire.Event{Kind: wire.EventGone, Instance: g.Instance, Role: g.Role, Text: "its connection to the HMM has ended"})
}

// emit tells operators what happened on this node.
func (d *Daemon) emit(e wire.Event) {
	if d.cfg.NATS == nil {
		return
	}
	e.Node = d.cfg.Node
	subject, data, err := e.Message()
	if err == nil {
		err = d.cfg.NATS.Publish(subject, data)
	}
	if err != nil {
		d.log.Warn("an event is lost", "kind", e.Kind, "text", e.Text, "error", err)
	}
}
