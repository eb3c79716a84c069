package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"trireme.dev/services/trireme/supervise"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/wire"
)

// Instances are started and stopped by number, as far as NPUs are spare and every role stays with somebody.
func TestReplicas(t *testing.T) {
	s := supervise.New(io.Discard, func(x supervise.Exit) { t.Errorf("%s ended by itself: %s", x.Child.Name, x.How) })
	r := &replicas{
		make: func(g conf.Group, name string) supervise.Child {
			return supervise.Child{Name: name, Path: "sleep", Args: []string{"1000"}}
		},
		must: []byte("EPD"), supervisor: s, named: map[string]int{}, out: io.Discard,
	}
	topology, err := conf.ParseTopology("1Dx0,1E1P2Dx2,1EP")
	if err != nil {
		t.Fatal(err)
	}
	r.begin(topology)
	defer func() {
		r.stopping.Wait()
		if err := s.Stop(10*time.Second, r.names()...); err != nil {
			t.Error(err)
		}
	}()
	spare := 5
	named := map[string]bool{} // who has NPUs
	for i := range 10 {
		for _, service := range []string{"encoder", "prefill", "decoder", "stage"} {
			named[fmt.Sprintf("%s-%d", service, i)] = service != "decoder" || i > 0 // that one is a standby
		}
	}
	ask := func(roles string, count int, check bool) wire.ReplicasReport {
		return r.set(wire.Replicas{Roles: roles, Count: count, Check: check}, func() (grants, error) { return grants{free: spare, named: named}, nil })
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
		{what: "three more need six", roles: "D", count: 7, why: "3 more instances of 2 NPUs need 6, and 5 are spare"},
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
