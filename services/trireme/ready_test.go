package main

import (
	"log/slog"
	"sync/atomic"
	"testing"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

// up is ready when all instances that it runs are: not with the first of a kind, not with those of another node that have the same name, and
// without those that an operator has stopped meanwhile.
func TestWaitStages(t *testing.T) {
	nats := bustest.Run(t)
	b, err := bus.Connect(t.Context(), nats.URL(), "stages", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	var ready atomic.Bool // what is not ready from the beginning
	announce := func(id, node, name string, is func() bool) {
		go func() {
			if err := b.Announce(t.Context(), func() wire.Instance {
				return wire.Instance{ID: id, Node: node, Name: name, Role: bus.StageDecode, Ready: is()}
			}); err != nil {
				t.Error(err)
			}
		}()
	}
	now := func() bool { return true }
	announce("a", "n", "decoder-0", now)
	announce("b", "n", "decoder-1", ready.Load)
	announce("c", "other", "decoder-1", now)
	looks := 0
	err = waitStages(t.Context(), nats.URL(), "n", func() []string {
		if looks++; looks == 3 {
			ready.Store(true)
			return []string{"decoder-0", "decoder-1", "stopped"}
		}
		return []string{"decoder-0", "decoder-1"}
	}, t.Output())
	if err != nil || !ready.Load() {
		t.Errorf("after %d looks: %v; all ready: %v", looks, err, ready.Load())
	}
}
