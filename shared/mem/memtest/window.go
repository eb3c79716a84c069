package memtest

import (
	"bytes"
	"errors"
	"testing"

	"trireme.dev/shared/mem"
)

// window opens a window that is closed before its space is.
func (f *fixture) window(t *testing.T, s mem.Space, pages int64) mem.Window {
	t.Helper()
	w, err := s.Window(pages * f.page)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// windows maps the same extents into two windows in another order each, changes one beside the other, and reads them all along.
func windows(t *testing.T, f *fixture) {
	s := f.open()
	a, b, c := f.extent(9, 2), f.extent(3, 2), f.extent(20, 2)
	want := map[mem.Extent][]byte{}
	for i, e := range []mem.Extent{a, b, c} {
		f.back(t, e)
		want[e] = noise(uint64(i), e.Bytes)
		f.write(t, f.mapped(t, s, e, mem.ReadWrite), want[e])
	}
	even, odd := f.window(t, s, 6), f.window(t, s, 6)
	place := func(w mem.Window, es ...mem.Extent) uintptr {
		t.Helper()
		var start uintptr
		for i, e := range es {
			at, err := w.Map(int64(i)*a.Bytes, e)
			if err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				start = at
			}
			if at != start+uintptr(i)*uintptr(a.Bytes) {
				t.Fatalf("place %d is at %#x, the window begins at %#x", i, at, start)
			}
		}
		return start
	}
	has := func(start uintptr, es ...mem.Extent) { // one read over all of them: the range is contiguous
		t.Helper()
		var all []byte
		for _, e := range es {
			all = append(all, want[e]...)
		}
		if !bytes.Equal(f.read(t, start, int64(len(all))), all) {
			t.Error("a window reads other bytes than its extents have")
		}
	}
	first := place(even, a, b, c)
	has(first, a, b, c)
	second := place(odd, c, a)
	has(second, c, a)
	has(first, a, b, c)
	// What is written where the space has an extent shows in both.
	want[a] = noise(7, a.Bytes)
	if err := s.Unmap(a); err != nil {
		t.Fatal(err)
	}
	at, err := s.Map(a, mem.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	f.write(t, at, want[a])
	has(first, a, b, c)
	has(second, c, a)
	// In place: the middle of the first becomes another one.
	if err := even.Unmap(a.Bytes); err != nil {
		t.Fatal(err)
	}
	if _, err := even.Map(a.Bytes, c); err != nil {
		t.Fatal(err)
	}
	has(first, a, c, c)
	// Without the space's own mapping the windows still read.
	if err := s.Unmap(c); err != nil {
		t.Fatal(err)
	}
	has(second, c, a)
	if i, ok := s.(mem.Importer); ok {
		if err := i.Forget(c); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Forget of an extent that windows have mapped: %v, want ErrInvalid", err)
		}
	}
}

func windowRules(t *testing.T, f *fixture) {
	s := f.open()
	for _, bytes := range []int64{0, -f.page, f.page + 1} {
		if _, err := s.Window(bytes); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("a window of %d bytes: %v, want ErrInvalid", bytes, err)
		}
	}
	e := f.extent(4, 2)
	f.back(t, e)
	f.mapped(t, s, e, mem.ReadWrite)
	w := f.window(t, s, 5)
	at, err := w.Map(f.page, e)
	if err != nil {
		t.Fatal(err)
	}
	for _, place := range []int64{0, f.page, 2 * f.page, 4 * f.page, 5 * f.page, -f.page, f.page / 2} {
		if _, err := w.Map(place, e); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Map of two pages at %#x over [1, 3) of 5 pages: %v, want ErrInvalid", place, err)
		}
	}
	for _, bad := range []mem.Extent{{}, {Offset: 1, Bytes: f.page}, f.extent(63, 2)} {
		if _, err := w.Map(3*f.page, bad); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Map of %v: %v, want ErrInvalid", bad, err)
		}
	}
	if err := w.Unmap(2 * f.page); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("Unmap in the middle of a mapping: %v, want ErrInvalid", err)
	}
	if b := w.Bytes(f.page); b != nil && f.Poke(at, []byte{1}) == nil {
		t.Error("a window can be written")
	}
	if err := w.Unmap(f.page); err != nil {
		t.Fatal(err)
	}
	if w.Bytes(f.page) != nil {
		t.Error("Bytes after Unmap is not nil")
	}
	if _, err := w.Map(0, e); err != nil {
		t.Errorf("Map where something was before: %v", err)
	}
	for range 2 {
		if err := w.Close(); err != nil {
			t.Fatalf("Close: %v", err)
		}
	}
	if _, err := w.Map(3*f.page, e); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("Map after Close: %v, want ErrInvalid", err)
	}
}
