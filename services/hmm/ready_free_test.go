package hmm

import (
	"errors"
	"log/slog"
	"path/filepath"
	"testing"

	"trireme.dev/shared/mem"
)

// Memory is readied only while the system has some to spare: it would end a process, this one perhaps, to have more.
func TestReadyLeavesMemoryToOthers(t *testing.T) {
	d, err := New(Config{Socket: filepath.Join(t.TempDir(), "s"), Node: "n", NPUs: 2, NPUBytes: 64 << 20, HostBytes: 1 << 20, PerNPU: true, Ready: 16 << 20},
		slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	unready := func() (all int64) {
		for _, s := range d.Stats().Spaces {
			all += s.Unready
		}
		return all
	}
	d.free = func() (int64, int64, error) { return 32<<20 - 1, 512 << 20, nil }
	if err := d.readyAll(t.Context()); !errors.Is(err, mem.ErrExhausted) || unready() != 32<<20 {
		t.Errorf("%d bytes are unready: %v", unready(), err)
	}
	d.free = func() (int64, int64, error) { return unready() + 16<<20, 512 << 20, nil } // it shrinks while memory is readied
	if err := d.readyAll(t.Context()); !errors.Is(err, mem.ErrExhausted) || unready() == 0 || unready() > 16<<20 {
		t.Errorf("%d bytes are unready: %v", unready(), err)
	}
	d.free = func() (int64, int64, error) { return 0, 0, errors.New("nobody knows") }
	if err := d.readyAll(t.Context()); err != nil || unready() != 0 {
		t.Errorf("%d bytes are unready: %v", unready(), err)
	}
	d.free = func() (int64, int64, error) { return 0, 512 << 20, nil }
	if err := d.readyAll(t.Context()); err != nil {
		t.Errorf("with all of it ready: %v", err)
	}
}

// What is dropped counts as ready, whatever else is kept of freed memory.
func TestDroppedMemoryIsReady(t *testing.T) {
	d, err := New(Config{Socket: filepath.Join(t.TempDir(), "s"), Node: "n", NPUs: 1, NPUBytes: 64 << 20, HostBytes: 1 << 20, CacheBytes: -1, Ready: 16 << 20},
		slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	e := mem.Extent{Bytes: 16 << 20}
	s := d.stores[1]
	if err := errors.Join(d.readyAll(t.Context()), s.Back(e), s.Drop(e)); err != nil {
		t.Fatal(err)
	}
	if got := s.Unready(16 << 20); got != 0 {
		t.Errorf("%d bytes are unready", got)
	}
}
