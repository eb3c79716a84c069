package vpage_test

import (
	"encoding/binary"
	"errors"
	"testing"

	"pgregory.net/rapid"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/memtest"
	"trireme.dev/shared/mem/vpage"
)

const page = mem.HostPage

// experts makes an extent for each expert, of one or two pages, with its number in it.
func experts(t testing.TB, store mem.Store, space mem.Space, layers, n int) [][]mem.Extent {
	t.Helper()
	all := make([][]mem.Extent, layers)
	at := int64(0)
	for l := range all {
		for e := range n {
			x := mem.Extent{Offset: at, Bytes: page * int64(1+e%2)}
			at += x.Bytes
			if err := store.Back(x); err != nil {
				t.Fatal(err)
			}
			if _, err := space.Map(x, mem.ReadWrite); err != nil {
				t.Fatal(err)
			}
			binary.LittleEndian.PutUint64(space.Bytes(x), uint64(l*n+e))
			all[l] = append(all[l], x)
		}
	}
	return all
}

// Whatever is prepared, given up, committed, released and changed in place, the present ranges have the present experts in order,
// and beside a prepared epoch still those of the one before.
func TestRanges(t *testing.T) {
	const layers, n = 3, 6
	store, space := memtest.Host(t, layers*n*2*page)
	all := experts(t, store, space, layers, n)
	idle := space.Mapped()
	rapid.Check(t, func(r *rapid.T) {
		ranges, err := vpage.New(space.Window, layers, n, 2*page)
		if err != nil {
			r.Fatal(err)
		}
		defer ranges.Close()
		present := make([][]int, layers)
		draw := func() ([][]int, [][]mem.Extent) {
			chosen, extents := make([][]int, layers), make([][]mem.Extent, layers)
			for l := range chosen {
				for e := range n {
					if rapid.Bool().Draw(r, "here") {
						chosen[l] = append(chosen[l], e)
						extents[l] = append(extents[l], all[l][e])
					}
				}
			}
			return chosen, extents
		}
		check := func() {
			for l, chosen := range present {
				for i, e := range chosen {
					b := ranges.Bytes(l, i)
					if got := binary.LittleEndian.Uint64(b); got != uint64(l*n+e) {
						r.Fatalf("place %d of layer %d has expert %d, want %d", i, l, got, l*n+e)
					}
				}
				if b := ranges.Bytes(l, len(chosen)); b != nil {
					r.Fatalf("layer %d has something behind its last expert", l)
				}
				if has := ranges.Base(l) != 0; has != (len(chosen) > 0) {
					r.Fatalf("layer %d of %d experts has a base: %v", l, len(chosen), has)
				}
			}
		}
		for range rapid.IntRange(1, 6).Draw(r, "changes") {
			next, extents := draw()
			switch rapid.SampledFrom([]string{"commit", "give up", "in place"}).Draw(r, "change") {
			case "commit":
				if err := ranges.Prepare(extents); err != nil {
					r.Fatal(err)
				}
				check()
				ranges.Commit()
				was := count(present)
				present = next
				check()
				if err := ranges.Prepare(extents); was > 0 && !errors.Is(err, mem.ErrInvalid) {
					r.Fatalf("Prepare before Release: %v, want ErrInvalid", err)
				}
			case "give up":
				if err := ranges.Prepare(extents); err != nil {
					r.Fatal(err)
				}
			case "in place":
				if err := ranges.InPlace(extents); err != nil {
					r.Fatal(err)
				}
				present = next
			}
			if err := ranges.Release(); err != nil {
				r.Fatal(err)
			}
			check()
		}
		if c := ranges.Calls(); c.Maps-c.Unmaps != count(present) {
			r.Fatalf("%+v, %d experts are mapped", c, count(present))
		}
	})
	if now := space.Mapped(); now != idle {
		t.Errorf("%d mappings in the space, %d before", now, idle)
	}
}

func count(layers [][]int) (n int) {
	for _, l := range layers {
		n += len(l)
	}
	return n
}

// brittle is a space whose windows fail at a certain Map.
type brittle struct {
	mem.Space
	left *int
}

type brittleWindow struct {
	mem.Window
	left *int
}

func (b brittle) Window(bytes int64) (mem.Window, error) {
	w, err := b.Space.Window(bytes)
	return brittleWindow{w, b.left}, err
}

var errBrittle = errors.New("the driver does not like it")

func (w brittleWindow) Map(at int64, e mem.Extent) (uintptr, error) {
	if *w.left--; *w.left < 0 {
		return 0, errBrittle
	}
	return w.Window.Map(at, e)
}

// A Prepare that fails anywhere leaves the present epoch as it is, and the next one succeeds.
func TestPrepareFails(t *testing.T) {
	const layers, n = 2, 4
	store, space := memtest.Host(t, layers*n*2*page)
	all := experts(t, store, space, layers, n)
	for fails := range layers * n {
		left := layers * n
		ranges, err := vpage.New(brittle{space, &left}.Window, layers, n, 2*page)
		if err != nil {
			t.Fatal(err)
		}
		if err := ranges.Prepare(all); err != nil {
			t.Fatal(err)
		}
		ranges.Commit()
		left = fails
		if err := ranges.Prepare(all); !errors.Is(err, errBrittle) {
			t.Fatalf("Prepare: %v, want the driver's error", err)
		}
		for l := range layers {
			for e := range n {
				if got := binary.LittleEndian.Uint64(ranges.Bytes(l, e)); got != uint64(l*n+e) {
					t.Fatalf("after a failed Prepare place %d of layer %d has expert %d", e, l, got)
				}
			}
		}
		left = layers * n
		if err := ranges.Prepare(all); err != nil {
			t.Errorf("Prepare after one that failed at map %d: %v", fails, err)
		}
		if err := ranges.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestBadRanges(t *testing.T) {
	_, space := memtest.Host(t, 8*page)
	if _, err := vpage.New(space.Window, 2, 2, page+1); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("New with a stride that is no whole pages: %v, want ErrInvalid", err)
	}
	ranges, err := vpage.New(space.Window, 2, 2, page)
	if err != nil {
		t.Fatal(err)
	}
	defer ranges.Close()
	for name, next := range map[string][][]mem.Extent{
		"of one layer":               {{}},
		"larger than a place":        {{}, {{Bytes: 2 * page}}},
		"more than there are places": {{{Bytes: page}, {Bytes: page}, {Bytes: page}}, nil},
	} {
		if err := ranges.Prepare(next); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Prepare of experts %s: %v, want ErrInvalid", name, err)
		}
	}
}
