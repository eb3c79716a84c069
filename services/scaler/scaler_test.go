package scaler

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/scaler/act"
	"trireme.dev/services/scaler/explain"
	"trireme.dev/services/scaler/lead"
	"trireme.dev/services/scaler/record"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// system answers on a real NATS as a gateway, an HMM and an instance of each stage do, whose prefill is asked for more than it does.
type system struct {
	bus   *bus.Bus
	beats *bus.Instances

	mu    sync.Mutex
	asked uint64 // rounds of questions so far
	load  uint64 // prompt tokens that arrive in a round
	npus  [3][]int
	spare []int
}

func newSystem(t *testing.T, url string) *system {
	t.Helper()
	s := &system{bus: connect(t, url, "system"), npus: [3][]int{{0}, {1}, {2}}, spare: []int{3, 4}}
	var err error
	if s.beats, err = s.bus.Instances(t.Context()); err != nil {
		t.Fatal(err)
	}
	// As if a scaler before had given up the lead: the first one waits for no lease, which is so long that a slow machine does not lose it.
	store, err := s.bus.JetStream().KeyValue(t.Context(), wire.BucketScaler)
	if err == nil {
		_, err = store.Put(t.Context(), "leader", []byte("{}"))
	}
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"encode", "prefill", "decode"}
	s.announce(t, func() wire.Instance { return wire.Instance{ID: "gateway-x", Role: "gateway", Node: "n", Ready: true} })
	for k, role := range names {
		s.announce(t, func() wire.Instance {
			s.mu.Lock()
			defer s.mu.Unlock()
			return wire.Instance{ID: role + "-x", Name: role, Role: role, Node: "n", Ready: true, NPUs: s.npus[k]}
		})
	}
	handle := func(subject string, f func(m *nats.Msg)) {
		if _, err := s.bus.Conn().Subscribe(subject, f); err != nil {
			t.Fatal(err)
		}
	}
	respond := func(m *nats.Msg, data []byte, err error) {
		if err == nil {
			err = m.Respond(data)
		}
		if err != nil {
			t.Error(err)
		}
	}
	handle(wire.SubjectStats, func(m *nats.Msg) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.asked++
		n := s.asked
		d := &wire.Demand{Requests: n * s.load / 100, PromptTokens: n * s.load, Computed: n * s.load}
		data, err := wire.Marshal(&wire.Stats{Instance: "gateway-x", Role: "gateway", Demand: d})
		respond(m, data, err)
		for k, role := range names {
			w := &wire.StageStats{Busy: time.Duration(n) * time.Second}
			for _, npu := range s.npus[k] {
				w.NPUs = append(w.NPUs, wire.NPUWork{NPU: npu, Busy: w.Busy})
			}
			w.Roles = []wire.RoleStats{{Role: role, Rows: n * 1000, Steps: n, Spent: w.Busy}}
			data, err := wire.Marshal(&wire.Stats{Instance: role + "-x", Role: role, Node: "n", Work: w})
			respond(m, data, err)
		}
	})
	handle(wire.SubjectHMM, func(m *nats.Msg) {
		s.mu.Lock()
		defer s.mu.Unlock()
		h := hbm.Stats{Node: "n"}
		for k, role := range names {
			for _, npu := range s.npus[k] {
				h.Memory = append(h.Memory, hbm.NPUStats{NPU: npu, Instance: role + "-x", Name: role, Capacity: 100, Free: 90})
			}
		}
		for _, npu := range s.spare {
			h.Memory = append(h.Memory, hbm.NPUStats{NPU: npu, Capacity: 100, Free: 100})
		}
		data, err := json.Marshal(&h)
		respond(m, data, err)
	})
	if err := s.bus.Conn().Flush(); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *system) announce(t *testing.T, f func() wire.Instance) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.bus.Announce(ctx, f) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func connect(t *testing.T, url, name string) *bus.Bus {
	t.Helper()
	b, err := bus.Connect(t.Context(), url, name, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

// lease is longer than a busy machine stands still. Who ends in order gives the lead up, so that it is waited for by nobody.
const lease = 10 * time.Second

// hands is an actuator that makes every change of the system as it is asked for it, and remembers for whom.
type hands struct {
	system *system
	begun  chan struct{} // closed when the first change is asked for; nil: not wanted
	hold   chan struct{} // the change waits for it; nil: it does not

	mu   sync.Mutex
	ops  []string // ids, in the order in which they were asked for
	made map[string]bool
}

func (h *hands) Able(context.Context, autoscale.Change) (string, bool) { return "", true }

func (h *hands) Do(ctx context.Context, t *lead.Term, op *lead.Operation) (act.Outcome, error) {
	h.mu.Lock()
	h.ops = append(h.ops, op.ID)
	if h.begun != nil && len(h.ops) == 1 {
		close(h.begun)
	}
	h.mu.Unlock()
	if h.hold != nil {
		select {
		case <-h.hold:
		case <-ctx.Done():
			return act.Outcome{}, ctx.Err()
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.made[op.ID] {
		h.made[op.ID] = true
		h.system.change(&op.Change)
	}
	if err := h.system.told(ctx); err != nil {
		return act.Outcome{}, err
	}
	return act.Outcome{Done: true}, nil
}

func (s *system) change(c *autoscale.Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.npus[c.Stage] = append(s.npus[c.Stage], c.Numbers...)
	s.spare = s.spare[min(len(c.Numbers), len(s.spare)):]
}

// told waits until the heartbeats say which NPUs instances have: what is measured soon behind a change is to be measured with it.
func (s *system) told(ctx context.Context) error {
	for {
		changed, told := s.beats.Changed(), 0
		s.mu.Lock()
		for k, role := range []string{"encode", "prefill", "decode"} {
			for _, i := range s.beats.Role(role) {
				if slices.Equal(i.NPUs, s.npus[k]) {
					told++
				}
			}
		}
		s.mu.Unlock()
		if told == len(s.npus) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// run runs a scaler until the returned function is called, which returns its error.
func run(t *testing.T, cfg Config) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg, slog.New(slog.DiscardHandler)) }()
	stop = sync.OnceValue(func() error {
		cancel()
		return <-done
	})
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("the scaler ended with %v", err)
		}
	})
	return stop
}

// await waits for an event that fits.
func await(t *testing.T, b *bus.Bus, what string, fits func(wire.Event) bool) wire.Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var found *wire.Event
	var seen []string
	enough := fmt.Errorf("enough")
	err := b.Events(ctx, bus.EventQuery{Kinds: []string{"scaler"}, Follow: true}, func(e wire.Event) error {
		seen = append(seen, e.Kind+" "+e.Text)
		if fits(e) {
			found = &e
			return enough
		}
		return nil
	})
	if found == nil {
		t.Fatalf("no event %s: %v\n%s", what, err, strings.Join(seen, "\n"))
	}
	return *found
}

// outcome fits the event of the outcome of a decision, with what was measured then.
func outcome(id string) func(wire.Event) bool {
	return func(e wire.Event) bool {
		var o explain.Outcome
		return e.Kind == wire.EventScalerOutcome && json.Unmarshal(e.Data, &o) == nil && o.ID == id && o.Measured != nil
	}
}

// A scaler sees too much asked of prefill, decides, has it done, and tells what came of it; its record decides the same.
func TestDecidesActsAndTells(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	s := newSystem(t, url)
	s.load = 3000
	h := &hands{system: s, made: map[string]bool{}}
	dir := t.TempDir()
	file := filepath.Join(dir, "record")
	policy := filepath.Join(dir, "scaler.yaml")
	if err := os.WriteFile(policy, []byte("mode: auto\nactions: [widen]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	stop := run(t, Config{
		NATSURL: url, Policy: policy, Record: file, Settle: time.Second, Lease: lease,
		Actuator: func(*bus.Bus, *slog.Logger) (act.Actuator, error) { return h, nil },
	})
	e := await(t, s.bus, "of a decision", func(e wire.Event) bool { return e.Kind == wire.EventScalerDecision })
	var d explain.Decision
	if err := json.Unmarshal(e.Data, &d); err != nil || d.Decision.Change.Action != autoscale.Widen || d.Decision.Change.Instance != "prefill" || d.Advice != "" {
		t.Fatalf("%+v, %v", d, err)
	}
	e = await(t, s.bus, "of its outcome", outcome(d.ID))
	var o explain.Outcome
	if err := json.Unmarshal(e.Data, &o); err != nil || !o.Made || o.Measured == nil || o.Measured.Stage[autoscale.Prefill] < 2 || o.Measured.NPUs != o.Expected.NPUs {
		t.Errorf("%+v, %v", o, err)
	}
	// A policy that cannot be used is refused, with its reason, and the one before stays; the next one is in force.
	if err := os.WriteFile(policy, []byte("budget: many"), 0o600); err != nil {
		t.Fatal(err)
	}
	e = await(t, s.bus, "of a refused policy", func(e wire.Event) bool { return e.Kind == wire.EventScalerPolicy })
	var p explain.Policy
	if err := json.Unmarshal(e.Data, &p); err != nil || !strings.Contains(p.Refused, "many") || p.Mode != autoscale.Auto || !strings.Contains(e.Text, "stays") {
		t.Errorf("%s: %+v, %v", e.Text, p, err)
	}
	if err := os.WriteFile(policy, []byte("mode: off"), 0o600); err != nil {
		t.Fatal(err)
	}
	await(t, s.bus, "of the next policy", func(e wire.Event) bool {
		return e.Kind == wire.EventScalerPolicy && strings.Contains(e.Text, "in force, mode off")
	})
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	changes := 0
	err = record.Replay(f, nil, func(s *record.Step) error {
		if !s.Same() {
			t.Errorf("decided\n%s\nand recorded is\n%s", s.Text, s.Recorded)
		}
		if s.Decision.Change.Action != autoscale.None {
			changes++
		}
		return nil
	})
	if err != nil || changes != len(h.ops) {
		t.Errorf("%d changes were recorded and %d asked for: %v", changes, len(h.ops), err)
	}
}

// Of two scalers one acts. When it goes in the middle of a change the other one ends that, under the same id, tells so, and goes on.
func TestASuccessorEndsWhatWasBegun(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	s := newSystem(t, url)
	s.load = 3000
	h := &hands{system: s, made: map[string]bool{}, begun: make(chan struct{}), hold: make(chan struct{})}
	cfg := Config{
		NATSURL: url, Mode: autoscale.Auto, Settle: time.Second, Lease: lease,
		Actuator: func(*bus.Bus, *slog.Logger) (act.Actuator, error) { return h, nil },
	}
	first := run(t, cfg)
	await(t, s.bus, "that it leads", func(e wire.Event) bool { return e.Kind == wire.EventScalerLead })
	run(t, cfg)
	select {
	case <-h.begun:
	case <-time.After(time.Minute):
		t.Fatal("no change is asked for")
	}
	if err := first(); err != nil { // as a process that is told to stop: what it waits for is not done
		t.Fatal(err)
	}
	var l explain.Lead
	await(t, s.bus, "that another one leads", func(e wire.Event) bool {
		return e.Kind == wire.EventScalerLead && json.Unmarshal(e.Data, &l) == nil && l.Operation != ""
	})
	close(h.hold)
	var o explain.Outcome
	e := await(t, s.bus, "of the outcome", outcome(l.Operation))
	if err := json.Unmarshal(e.Data, &o); err != nil || !o.Made || !o.Succeeded || o.Scaler != l.Scaler {
		t.Errorf("%+v, %v", o, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.ops) < 2 || h.ops[0] != l.Operation || h.ops[1] != l.Operation {
		t.Errorf("asked for were %v, and left was %s", h.ops, l.Operation)
	}
}

// The outcome of a change that its scaler has made, but not measured when it goes, is measured by its successor.
func TestASuccessorMeasuresTheOutcome(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	s := newSystem(t, url)
	s.load = 3000
	h := &hands{system: s, made: map[string]bool{}}
	cfg := Config{
		NATSURL: url, Mode: autoscale.Auto, Settle: time.Hour, Lease: lease,
		Actuator: func(*bus.Bus, *slog.Logger) (act.Actuator, error) { return h, nil },
	}
	first := run(t, cfg)
	var made, measured explain.Outcome
	await(t, s.bus, "of a change that is made", func(e wire.Event) bool {
		return e.Kind == wire.EventScalerOutcome && json.Unmarshal(e.Data, &made) == nil && made.Made
	})
	if err := first(); err != nil {
		t.Fatal(err)
	}
	cfg.Settle = time.Second
	run(t, cfg)
	e := await(t, s.bus, "of its outcome", outcome(made.ID))
	if err := json.Unmarshal(e.Data, &measured); err != nil || !measured.Succeeded || measured.Scaler == made.Scaler || measured.Expected == nil || measured.Change.Instance != "prefill" {
		t.Errorf("%+v, %v", measured, err)
	}
}
