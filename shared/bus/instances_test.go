package bus_test

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

// waitFor waits until the view satisfies ok.
func waitFor(t *testing.T, v *bus.Instances, ok func([]wire.Instance) bool) {
	t.Helper()
	timeout := time.After(long)
	for {
		changed := v.Changed()
		if ok(v.All()) {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("the view stays at %+v", v.All())
		}
	}
}

func TestHeartbeats(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	ttl := bus.WithInstanceTTL(5 * time.Second)
	watcher := connect(t, url, ttl)
	view, err := watcher.Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if all := view.All(); len(all) != 0 {
		t.Fatalf("nobody announced, yet there is %+v", all)
	}

	var ready atomic.Bool
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stopped := make(chan error, 1)
	encoder := connect(t, url, ttl)
	go func() {
		stopped <- encoder.Announce(ctx, func() wire.Instance {
			return wire.Instance{ID: "e0", Role: "encode+prefill", NPUs: []int{3}, Ready: ready.Load()}
		})
	}()
	dying := connect(t, url, ttl)
	died := make(chan error, 1)
	go func() {
		died <- dying.Announce(context.Background(), func() wire.Instance { return wire.Instance{ID: "d0", Role: "decode"} })
	}()
	waitFor(t, view, func(all []wire.Instance) bool {
		return len(all) == 2 && all[0].ID == "d0" && all[1].ID == "e0" && all[1].NPUs[0] == 3
	})
	ready.Store(true)
	waitFor(t, view, func([]wire.Instance) bool {
		encoders := view.Role("encode")
		return len(encoders) == 1 && encoders[0].Ready
	})
	for role, n := range map[string]int{"encode": 1, "prefill": 1, "decode": 1, "code": 0, "encode+prefill": 0} {
		if got := view.Role(role); len(got) != n {
			t.Errorf("%d instances with role %s, want %d", len(got), role, n)
		}
	}
	late, err := watcher.Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if all := late.All(); len(all) != 2 {
		t.Errorf("a late view starts with %+v", all)
	}

	// A process that dies leaves its heartbeat to expire: no delete, as its connection is just cut.
	dying.Conn().Close()
	waitFor(t, view, func(all []wire.Instance) bool { return len(all) == 1 && all[0].ID == "e0" })
	// One that stops takes its heartbeat with it.
	cancel()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	waitFor(t, view, func(all []wire.Instance) bool { return len(all) == 0 })
	waitFor(t, late, func(all []wire.Instance) bool { return len(all) == 0 })
	dying.Close()
	if err := <-died; err != nil {
		t.Error(err)
	}
}

// A view of gateways has no others, and they are gone from it as from one of all.
func TestViewOfGateways(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	b := connect(t, url)
	all, err := b.Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	view, err := b.Gateways(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range []wire.Instance{{ID: "d0", Role: "decode"}, {ID: "g0", Role: "gateway"}} {
		go func() { _ = b.Announce(t.Context(), func() wire.Instance { return i }) }()
	}
	waitFor(t, all, func(all []wire.Instance) bool { return len(all) == 2 })
	waitFor(t, view, func(all []wire.Instance) bool { return len(all) == 1 && all[0].ID == "g0" })
	if !view.Alive("g0") || view.Alive("d0") || !all.Alive("d0") {
		t.Error("who is alive is not who announces itself")
	}
	late, err := b.Gateways(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := late.All(); len(got) != 1 || got[0].ID != "g0" {
		t.Errorf("a late view starts with %+v", got)
	}
}

// Close takes the heartbeat back, and announces none after that.
func TestCloseEndsHeartbeat(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	view, err := connect(t, url, bus.WithInstanceTTL(time.Hour)).Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b := connect(t, url, bus.WithInstanceTTL(time.Hour))
	stopped := make(chan error, 1)
	go func() {
		stopped <- b.Announce(context.Background(), func() wire.Instance { return wire.Instance{ID: "d0", Role: "decode"} })
	}()
	waitFor(t, view, func(all []wire.Instance) bool { return len(all) == 1 })
	b.Close()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	waitFor(t, view, func(all []wire.Instance) bool { return len(all) == 0 })
	if err := b.Announce(t.Context(), func() wire.Instance { return wire.Instance{ID: "d0"} }); !errors.Is(err, bus.ErrClosed) {
		t.Errorf("announcing on a closed Bus: %v", err)
	}
}

// The heartbeat of a process that was killed stays for a while beside that of the one that was started in its place: the name means the latter.
func TestNameOfASuccessor(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	slow := bus.WithInstanceTTL(10 * time.Minute) // who has announced itself once does not again
	view, err := connect(t, url, slow).Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for n, i := range []wire.Instance{
		{ID: "decoder-0-b", Name: "decoder-0", Node: "n", Role: "decode"},
		{ID: "decoder-0-c", Name: "decoder-0", Node: "m", Role: "decode"},
		{ID: "decode-d", Node: "n", Role: "decode"},
		{ID: "decode-e", Node: "n", Role: "decode"},
		{ID: "decoder-0-a", Name: "decoder-0", Node: "n", Role: "decode"},
	} {
		b := connect(t, url, slow)
		go func() { _ = b.Announce(t.Context(), func() wire.Instance { return i }) }()
		waitFor(t, view, func(all []wire.Instance) bool { return len(all) == n+1 })
	}
	var named []string
	for _, i := range view.Named() {
		named = append(named, i.ID)
	}
	if want := []string{"decode-d", "decode-e", "decoder-0-a", "decoder-0-c"}; !slices.Equal(named, want) {
		t.Errorf("by name there are %v, want %v", named, want)
	}
}
