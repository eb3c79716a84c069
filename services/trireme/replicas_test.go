package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"trireme.dev/services/scaler/act"
	"trireme.dev/services/scaler/lead"
	"trireme.dev/services/trireme/supervise"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// sleepers are replicas of a topology that do nothing, and end with the test.
func sleepers(t *testing.T, topology string) *replicas {
	t.Helper()
	s := supervise.New(io.Discard, func(x supervise.Exit) { t.Errorf("%s ended by itself: %s", x.Child.Name, x.How) })
	r := &replicas{
		make: func(g conf.Group, name string) supervise.Child {
			return supervise.Child{Name: name, Path: "sleep", Args: []string{"1000"}}
		},
		must: []byte("EPD"), supervisor: s, named: map[string]int{}, out: io.Discard,
	}
	parsed, err := conf.ParseTopology(topology)
	if err != nil {
		t.Fatal(err)
	}
	r.begin(parsed)
	t.Cleanup(func() {
		r.stopping.Wait()
		if err := s.Stop(10*time.Second, r.names()...); err != nil {
			t.Error(err)
		}
	})
	return r
}

// Of what scalers ask for, by id, and with the fence of the one that acts, nothing is done twice, and nothing that a later one does not
// know of.
func TestReplicasOfScalers(t *testing.T) {
	r := sleepers(t, "1E1P2D")
	named := map[string]bool{"encoder-0": true, "prefill-0": true}
	for i := range 10 {
		named[fmt.Sprint("decoder-", i)] = true
	}
	for _, c := range []struct {
		what      string
		ask       wire.Replicas
		instances string // that decode, then
		changed   string // started or stopped
		again     bool
		why       string
	}{
		{what: "one more", ask: wire.Replicas{Roles: "D", Start: 1, ID: "a", Fence: 5}, instances: "decoder-0 decoder-1 decoder-2", changed: "decoder-2"},
		{what: "the same, asked again by the successor", ask: wire.Replicas{Roles: "D", Start: 1, ID: "a", Fence: 6}, again: true,
			instances: "decoder-0 decoder-1 decoder-2", changed: "decoder-2"},
		{what: "another one, of the scaler before", ask: wire.Replicas{Roles: "D", Start: 1, ID: "b", Fence: 5}, why: "fence 5, and one with 6"},
		{what: "the first, late", ask: wire.Replicas{Roles: "D", Start: 1, ID: "a", Fence: 5}, again: true,
			instances: "decoder-0 decoder-1 decoder-2", changed: "decoder-2"},
		{what: "an operator", ask: wire.Replicas{Roles: "D", Count: 4}, instances: "decoder-0 decoder-1 decoder-2 decoder-3", changed: "decoder-3"},
		{what: "a plan is not kept", ask: wire.Replicas{Roles: "D", Stop: []string{"decoder-1"}, ID: "c", Fence: 6, Check: true},
			instances: "decoder-0 decoder-2 decoder-3", changed: "decoder-1"},
		{what: "a certain one ends", ask: wire.Replicas{Roles: "D", Stop: []string{"decoder-1"}, ID: "c", Fence: 6},
			instances: "decoder-0 decoder-2 decoder-3", changed: "decoder-1"},
		{what: "it does so once", ask: wire.Replicas{Roles: "D", Stop: []string{"decoder-1"}, ID: "c", Fence: 6}, again: true,
			instances: "decoder-0 decoder-2 decoder-3", changed: "decoder-1"},
		{what: "under another id it is not there", ask: wire.Replicas{Roles: "D", Stop: []string{"decoder-1"}, ID: "d", Fence: 7}, why: "no instance decoder-1"},
		{what: "what was refused can be asked for again", ask: wire.Replicas{Roles: "D", Start: 9, ID: "e", Fence: 7}, why: "need 9 spare NPUs, and there are 5"},
		{what: "and done then", ask: wire.Replicas{Roles: "D", Start: 1, ID: "e", Fence: 7}, instances: "decoder-0 decoder-2 decoder-3 decoder-4", changed: "decoder-4"},
		{what: "larger ones", ask: wire.Replicas{Roles: "D", Start: 2, NPUs: 2, ID: "f", Fence: 7},
			instances: "decoder-0 decoder-2 decoder-3 decoder-4 decoder-5 decoder-6", changed: "decoder-5 decoder-6"},
		{what: "the only encoder", ask: wire.Replicas{Roles: "E", Stop: []string{"encoder-0"}, ID: "g", Fence: 7}, why: "no instance with role E would be left"},
		{what: "fewer than none", ask: wire.Replicas{Roles: "D", Start: -1, ID: "h", Fence: 7}, why: "none at the least"},
	} {
		got := r.set(c.ask, func() (grants, error) { return grants{spare: []int{0, 1, 2, 3, 4}, named: named}, nil })
		if c.why != "" || got.Why != "" {
			if c.why == "" || !strings.Contains(got.Why, c.why) {
				t.Errorf("%s: refused with %q, want %q", c.what, got.Why, c.why)
			}
			continue
		}
		if changed := append(slices.Clone(got.Started), got.Stopped...); strings.Join(got.Instances, " ") != c.instances ||
			strings.Join(changed, " ") != c.changed || got.Again != c.again {
			t.Errorf("%s: %+v, want %s, of which %s", c.what, got, c.instances, c.changed)
		}
	}
	if want := []string{"encoder-0", "prefill-0", "decoder-0", "decoder-2", "decoder-3", "decoder-4", "decoder-5", "decoder-6"}; !slices.Equal(r.names(), want) {
		t.Errorf("there are %v, want %v", r.names(), want)
	}
}

// A scaler has processes started that do not become ready, which are stopped again, and a certain one stopped. Where nobody starts
// processes it has a command to tell.
func TestScalerStartsProcesses(t *testing.T) {
	b, err := bus.Connect(t.Context(), bustest.Run(t).URL(), "test", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	r := sleepers(t, "1E1P2D") // they have no heartbeat: they are never ready, and gone at once
	named := map[string]bool{"decoder-0": true}
	if _, err := b.Handle(wire.SubjectReplicas("n"), func(data []byte, respond func(any) error) {
		var ask wire.Replicas
		if err := wire.Unmarshal(data, &ask); err != nil {
			t.Error(err)
		}
		report := r.set(ask, func() (grants, error) { return grants{spare: []int{0, 1}, named: named}, nil })
		if err := respond(&report); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	store, err := b.JetStream().KeyValue(t.Context(), wire.BucketScaler)
	if err == nil {
		_, err = store.Put(t.Context(), "leader", []byte("{}")) // given up by the one before
	}
	if err != nil {
		t.Fatal(err)
	}
	a, err := act.New(t.Context(), act.Config{Bus: b, Ready: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	err = lead.Run(t.Context(), lead.Config{Bus: b, ID: "scaler", Lease: time.Minute}, func(ctx context.Context, tm *lead.Term) error {
		do := func(id string, c autoscale.Change) act.Outcome {
			out, err := a.Do(ctx, tm, &lead.Operation{ID: id, Change: c})
			if err != nil {
				t.Error(err)
			}
			return out
		}
		add := autoscale.Change{Action: autoscale.Add, Node: "n", Roles: "D", NPUs: 1, Count: 2}
		if _, ok := a.Able(ctx, add); !ok {
			t.Error("nobody starts processes on the node")
		}
		if out := do("a", add); out.Done || !strings.Contains(out.Why, "decoder-2, decoder-3 was not ready within 100ms") {
			t.Errorf("%+v", out)
		}
		if want := []string{"encoder-0", "prefill-0", "decoder-0", "decoder-1"}; !slices.Equal(r.names(), want) {
			t.Errorf("there are %v, want %v", r.names(), want)
		}
		if out := do("b", autoscale.Change{Action: autoscale.Remove, Node: "n", Roles: "D", Instance: "decoder-1"}); !out.Done || !slices.Equal(out.Stopped, []string{"decoder-1"}) {
			t.Errorf("%+v", out)
		}
		if out := do("c", autoscale.Change{Action: autoscale.Remove, Node: "n", Roles: "D", Instance: "decoder-0"}); out.Done || !strings.Contains(out.Why, "no instance with role D would be left") {
			t.Errorf("%+v", out)
		}
		add.Count = 3
		if out := do("d", add); out.Done || !strings.Contains(out.Why, "and there are 2:") {
			t.Errorf("%+v", out)
		}
		// Somebody has seen a greater fence.
		r.set(wire.Replicas{Roles: "D", Count: 1, Check: true, Fence: 1000}, func() (grants, error) { return grants{}, nil })
		add.Count = 1
		if out := do("e", add); out.Done || !strings.Contains(out.Why, "not ready") || tm.Fence() <= 1000 {
			t.Errorf("%+v, with fence %d", out, tm.Fence())
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// Instances are started and stopped by number, as far as NPUs are spare and every role stays with somebody.
func TestReplicas(t *testing.T) {
	r := sleepers(t, "1Dx0,1E1P2Dx2,1EP")
	spare := 5
	named := map[string]bool{} // who has NPUs
	for i := range 10 {
		for _, service := range []string{"encoder", "prefill", "decoder", "stage"} {
			named[fmt.Sprintf("%s-%d", service, i)] = service != "decoder" || i > 0 // that one is a standby
		}
	}
	ask := func(roles string, count int, check bool) wire.ReplicasReport {
		return r.set(wire.Replicas{Roles: roles, Count: count, Check: check}, func() (grants, error) { return grants{spare: make([]int, spare), named: named}, nil })
	}
	for _, c := range []struct {
		what                        string
		roles                       string
		count                       int
		check                       bool
		instances, started, stopped []string
		why                         string
	}{
		{what: "a plan changes nothing", roles: "D", count: 1, check: true, instances: []string{"decoder-1"}, stopped: []string{"decoder-2"}},
		{what: "as it is", roles: "D", count: 2, instances: []string{"decoder-1", "decoder-2"}},
		{what: "two more of two NPUs", roles: "D", count: 4, instances: []string{"decoder-1", "decoder-2", "decoder-3", "decoder-4"}, started: []string{"decoder-3", "decoder-4"}},
		{what: "three more need six", roles: "D", count: 7, why: "3 more instances of 2 NPUs each need 6 spare NPUs, and there are 5"},
		{what: "the last ones go", roles: "D", count: 1, instances: []string{"decoder-1"}, stopped: []string{"decoder-2", "decoder-3", "decoder-4"}},
		{what: "nobody else decodes", roles: "D", count: 0, why: "no instance with role D would be left"},
		{what: "names are new", roles: "D", count: 2, instances: []string{"decoder-1", "decoder-5"}, started: []string{"decoder-5"}},
		{what: "another one encodes", roles: "E", count: 0, stopped: []string{"encoder-0"}},
		{what: "now none other does", roles: "EP", count: 0, why: "no instance with role E would be left"},
		{what: "a kind that was not there", roles: "EPD", count: 1, instances: []string{"stage-1"}, started: []string{"stage-1"}},
		{what: "no roles", roles: "X", count: 1, why: "X"},
		{what: "fewer than none", roles: "D", count: -1, why: "none at the least"},
	} {
		before := r.names()
		got := ask(c.roles, c.count, c.check)
		if c.why != "" || got.Why != "" {
			if c.why == "" || !strings.Contains(got.Why, c.why) {
				t.Errorf("%s: refused with %q, want %q", c.what, got.Why, c.why)
			}
			if !slices.Equal(r.names(), before) {
				t.Errorf("%s: refused, and yet %v became %v", c.what, before, r.names())
			}
			continue
		}
		if !slices.Equal(got.Instances, c.instances) || !slices.Equal(got.Started, c.started) || !slices.Equal(got.Stopped, c.stopped) {
			t.Errorf("%s: %+v, want %v, started %v, stopped %v", c.what, got, c.instances, c.started, c.stopped)
		}
		if c.check != slices.Equal(r.names(), before) && len(c.started)+len(c.stopped) > 0 {
			t.Errorf("%s: %v became %v", c.what, before, r.names())
		}
	}
}
