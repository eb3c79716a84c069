package memtest

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"sync"
	"testing"
	"unsafe"

	"trireme.dev/shared/mem"
)

// Backend is what the suite needs of a backend.
type Backend struct {
	// New returns a store with room for Pages pages and a function that opens a new space on it, as another process would.
	// Whatever they take is closed by t.Cleanup.
	New func(t *testing.T) (mem.Store, func() mem.Space)
	// File is the descriptor for all memory of a store that New returned. Nil for stores that are mem.Exporters.
	File func(mem.Store) *os.File
	// Open opens a space on a store of another process. It takes f over, the store's File, nil for mem.Exporters.
	Open func(f *os.File, bytes int64) (mem.Space, error)
	// Peek and Poke copy between p and mapped memory; an error when it may not be accessed so, after which a process may be
	// of no more use. Nil: by the CPU.
	Peek func(p []byte, at uintptr) error
	Poke func(at uintptr, p []byte) error
}

// Pages is the size of the stores that the suite works on.
const Pages = 64

// Run checks that a backend keeps the rules of mem.Store and mem.Space, and those of mem.Exporter and mem.Importer if it
// has them, in one process and between several: the binary's TestMain must call Main.
func Run(t *testing.T, b Backend) {
	b = b.filled()
	tests := map[string]func(*testing.T, *fixture){
		"FreshIsZero":        freshIsZero,
		"SharedBytes":        sharedBytes,
		"SameAddress":        sameAddress,
		"NoOverwrite":        noOverwrite,
		"WholeExtents":       wholeExtents,
		"BadExtents":         badExtents,
		"DropWhileMapped":    dropKeepsOthers,
		"Closed":             closed,
		"StoreClosed":        storeClosed,
		"Concurrent":         concurrent,
		"Windows":            windows,
		"WindowRules":        windowRules,
		"Between/Bytes":      otherProcessSees,
		"Between/Killed":     killedWriter,
		"Between/Generation": generations,
		"Between/ReadOnly":   readOnly,
		"Between/Unmapped":   noAccessUnmapped,
		"Between/NotMapped":  noAccessBeforeMap,
	}
	store, _ := b.New(t)
	if _, ok := store.(mem.Exporter); ok {
		tests["Imports"] = imports
		tests["Between/StaleMap"] = staleMap
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			NoLeaks(t)
			store, open := b.New(t)
			test(t, &fixture{b, store, open, store.Page()})
		})
	}
}

func (b Backend) filled() Backend {
	if b.Peek == nil {
		b.Peek = func(p []byte, at uintptr) error { return byCPU(func() { copy(p, pointed(at, len(p))) }) }
	}
	if b.Poke == nil {
		b.Poke = func(at uintptr, p []byte) error { return byCPU(func() { copy(pointed(at, len(p)), p) }) }
	}
	return b
}

var errFault = errors.New("memory fault")

// byCPU does f and reports a touch of memory that it has no access to.
func byCPU(f func()) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if recover() != nil {
			err = errFault
		}
	}()
	f()
	return nil
}

// pointed is the memory at an address outside of Go's heap.
func pointed(at uintptr, n int) []byte {
	return unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&at))), n)
}

type fixture struct {
	Backend
	store mem.Store
	open  func() mem.Space
	page  int64
}

// extent is n pages from page first on.
func (f *fixture) extent(first, n int64) mem.Extent {
	return mem.Extent{Offset: first * f.page, Bytes: n * f.page}
}

func (f *fixture) back(t *testing.T, e mem.Extent) {
	t.Helper()
	if err := f.store.Back(e); err != nil {
		t.Fatalf("Back(%v): %v", e, err)
	}
}

// mapped brings e into a space and maps it.
func (f *fixture) mapped(t *testing.T, s mem.Space, e mem.Extent, a mem.Access) uintptr {
	t.Helper()
	if file := f.export(t, e); file != nil {
		if err := s.(mem.Importer).Import(e, file); err != nil {
			t.Fatalf("Import(%v): %v", e, err)
		}
	}
	at, err := s.Map(e, a)
	if err != nil {
		t.Fatalf("Map(%v): %v", e, err)
	}
	return at
}

// export is the descriptor for e, nil when the store has one for all.
func (f *fixture) export(t *testing.T, e mem.Extent) *os.File {
	t.Helper()
	x, ok := f.store.(mem.Exporter)
	if !ok {
		return nil
	}
	file, err := x.Export(e)
	if err != nil {
		t.Fatalf("Export(%v): %v", e, err)
	}
	return file
}

// unmapped takes e out of a space.
func (f *fixture) unmapped(t *testing.T, s mem.Space, e mem.Extent) {
	t.Helper()
	if err := s.Unmap(e); err != nil {
		t.Fatal(err)
	}
	if i, ok := s.(mem.Importer); ok {
		if err := i.Forget(e); err != nil {
			t.Fatal(err)
		}
	}
}

func (f *fixture) read(t *testing.T, at uintptr, n int64) []byte {
	t.Helper()
	p := make([]byte, n)
	if err := f.Peek(p, at); err != nil {
		t.Fatalf("reading %d bytes at %#x: %v", n, at, err)
	}
	return p
}

func (f *fixture) write(t *testing.T, at uintptr, p []byte) {
	t.Helper()
	if err := f.Poke(at, p); err != nil {
		t.Fatalf("writing %d bytes at %#x: %v", len(p), at, err)
	}
}

func noise(seed uint64, n int64) []byte {
	p := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, uint64(n)))
	for i := range p {
		p[i] = byte(1 + r.IntN(255)) // never zero
	}
	return p
}

func freshIsZero(t *testing.T, f *fixture) {
	s := f.open()
	e := f.extent(3, 5)
	for round := range 3 {
		f.back(t, e)
		at := f.mapped(t, s, e, mem.ReadWrite)
		if !allZero(f.read(t, at, e.Bytes)) {
			t.Fatalf("round %d: fresh memory is not zero", round)
		}
		f.write(t, at, noise(1, e.Bytes))
		f.unmapped(t, s, e)
		if err := f.store.Drop(e); err != nil {
			t.Fatal(err)
		}
	}
	// Placed otherwise, over pages that were used and pages that were not.
	e = f.extent(0, 20)
	f.back(t, e)
	if !allZero(f.read(t, f.mapped(t, s, e, mem.ReadOnly), e.Bytes)) {
		t.Fatal("memory of mixed history is not zero")
	}
}

func allZero(p []byte) bool { return len(bytes.Trim(p, "\x00")) == 0 }

func sharedBytes(t *testing.T, f *fixture) {
	writer, reader := f.open(), f.open()
	e := f.extent(7, 2)
	f.back(t, e)
	to := f.mapped(t, writer, e, mem.ReadWrite)
	from := f.mapped(t, reader, e, mem.ReadOnly)
	want := noise(1, e.Bytes)
	f.write(t, to, want)
	if !bytes.Equal(f.read(t, from, e.Bytes), want) {
		t.Fatal("another space sees other bytes")
	}
	f.unmapped(t, writer, e)
	if !bytes.Equal(f.read(t, from, e.Bytes), want) {
		t.Fatal("the bytes went with the writer's mapping")
	}
}

func sameAddress(t *testing.T, f *fixture) {
	s := f.open()
	e, next := f.extent(4, 2), f.extent(6, 1)
	f.back(t, e)
	f.back(t, next)
	at := f.mapped(t, s, e, mem.ReadOnly)
	if beside := f.mapped(t, s, next, mem.ReadOnly); beside != at+uintptr(e.Bytes) {
		t.Errorf("neighbour mapped at %#x, want %#x", beside, at+uintptr(e.Bytes))
	}
	if err := s.Unmap(e); err != nil {
		t.Fatal(err)
	}
	again, err := s.Map(e, mem.ReadWrite) // an import outlives Unmap
	if err != nil || again != at {
		t.Errorf("mapped at %#x, then at %#x, %v", at, again, err)
	}
	f.unmapped(t, s, e)
	if again := f.mapped(t, s, e, mem.ReadWrite); again != at {
		t.Errorf("mapped at %#x, then at %#x", at, again)
	}
}

func noOverwrite(t *testing.T, f *fixture) {
	s := f.open()
	e := f.extent(8, 4)
	f.back(t, e)
	at := f.mapped(t, s, e, mem.ReadWrite)
	want := noise(1, e.Bytes)
	f.write(t, at, want)
	for _, over := range []mem.Extent{e, f.extent(8, 1), f.extent(11, 1), f.extent(6, 3), f.extent(11, 4), f.extent(0, 30)} {
		if _, err := s.Map(over, mem.ReadWrite); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Map(%v) over %v: %v, want ErrInvalid", over, e, err)
		}
	}
	if !bytes.Equal(f.read(t, at, e.Bytes), want) {
		t.Error("a refused mapping changed the bytes")
	}
	if err := f.store.Back(f.extent(10, 4)); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("Back over an extent in use: %v, want ErrInvalid", err)
	}
}

func wholeExtents(t *testing.T, f *fixture) {
	s := f.open()
	e := f.extent(2, 4)
	f.back(t, e)
	f.mapped(t, s, e, mem.ReadWrite)
	for _, part := range []mem.Extent{f.extent(2, 3), f.extent(3, 3), f.extent(2, 5), f.extent(20, 1)} {
		if err := s.Unmap(part); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Unmap(%v) of %v: %v, want ErrInvalid", part, e, err)
		}
		if err := s.Protect(part, mem.ReadOnly); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Protect(%v) of %v: %v, want ErrInvalid", part, e, err)
		}
		if s.Bytes(part) != nil {
			t.Errorf("Bytes(%v) of %v is not nil", part, e)
		}
	}
	for _, part := range []mem.Extent{f.extent(2, 3), f.extent(3, 3), f.extent(1, 5), f.extent(5, 9)} {
		if err := f.store.Drop(part); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Drop(%v) of %v: %v, want ErrInvalid", part, e, err)
		}
	}
	if err := f.store.Drop(f.extent(20, 2)); err != nil {
		t.Errorf("Drop of what has no memory: %v", err)
	}
	f.unmapped(t, s, e)
	if err := s.Unmap(e); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("Unmap of an unmapped extent: %v, want ErrInvalid", err)
	}
	if err := s.Protect(e, mem.ReadWrite); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("Protect of an unmapped extent: %v, want ErrInvalid", err)
	}
	for range 2 {
		if err := f.store.Drop(e); err != nil {
			t.Errorf("Drop: %v", err)
		}
	}
}

func badExtents(t *testing.T, f *fixture) {
	s := f.open()
	for _, e := range []mem.Extent{
		{}, {Bytes: -f.page}, {Bytes: f.page - 1}, {Offset: 1, Bytes: f.page}, {Offset: -f.page, Bytes: f.page},
		f.extent(63, 2), f.extent(1<<40, 1), {Offset: f.page, Bytes: math.MaxInt64 - f.page + 1},
	} {
		if _, err := s.Map(e, mem.ReadOnly); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Map(%v): %v, want ErrInvalid", e, err)
		}
		if err := f.store.Back(e); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Back(%v): %v, want ErrInvalid", e, err)
		}
		if err := f.store.Drop(e); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Drop(%v): %v, want ErrInvalid", e, err)
		}
	}
}

func dropKeepsOthers(t *testing.T, f *fixture) {
	s := f.open()
	a, b, c := f.extent(0, 3), f.extent(3, 2), f.extent(5, 3)
	at := map[mem.Extent]uintptr{}
	for i, e := range []mem.Extent{a, b, c} {
		f.back(t, e)
		at[e] = f.mapped(t, s, e, mem.ReadWrite)
		f.write(t, at[e], noise(uint64(i), e.Bytes))
	}
	f.unmapped(t, s, b)
	if err := f.store.Drop(b); err != nil {
		t.Fatal(err)
	}
	for i, e := range []mem.Extent{a, b, c} {
		if e != b && !bytes.Equal(f.read(t, at[e], e.Bytes), noise(uint64(i), e.Bytes)) {
			t.Errorf("%v changed when its neighbour was dropped", e)
		}
	}
}

func closed(t *testing.T, f *fixture) {
	s := f.open()
	e := f.extent(0, 1)
	f.back(t, e)
	f.mapped(t, s, e, mem.ReadWrite)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatalf("Close: %v", err)
		}
	}
	if _, err := s.Map(e, mem.ReadOnly); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("Map after Close: %v, want ErrInvalid", err)
	}
	if err := s.Unmap(e); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("Unmap after Close: %v, want ErrInvalid", err)
	}
	if s.Bytes(e) != nil {
		t.Error("Bytes after Close is not nil")
	}
}

func storeClosed(t *testing.T, f *fixture) {
	s := f.open()
	e := f.extent(2, 3)
	f.back(t, e)
	at := f.mapped(t, s, e, mem.ReadWrite)
	want := noise(3, e.Bytes)
	f.write(t, at, want)
	for range 2 {
		if err := f.store.Close(); err != nil {
			t.Fatalf("Close: %v", err)
		}
	}
	if !bytes.Equal(f.read(t, at, e.Bytes), want) {
		t.Error("closing the store took the bytes from under a mapping")
	}
}

// concurrent takes disjoint extents through their lives at once, on one store and one space.
func concurrent(t *testing.T, f *fixture) {
	const workers, rounds = 8, 4
	s := f.open()
	life := func(e mem.Extent, seed uint64) error {
		if err := f.store.Back(e); err != nil {
			return err
		}
		if x, ok := f.store.(mem.Exporter); ok {
			file, err := x.Export(e)
			if err != nil {
				return err
			}
			if err := s.(mem.Importer).Import(e, file); err != nil {
				return err
			}
		}
		at, err := s.Map(e, mem.ReadWrite)
		if err != nil {
			return err
		}
		got, want := make([]byte, e.Bytes), noise(seed, e.Bytes)
		err = f.Peek(got, at)
		if err == nil && !allZero(got) {
			err = fmt.Errorf("%v is not zero when fresh", e)
		}
		if err = errors.Join(err, f.Poke(at, want), s.Protect(e, mem.ReadOnly), f.Peek(got, at)); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("%v holds other bytes than were written", e)
		}
		if err := s.Unmap(e); err != nil {
			return err
		}
		if i, ok := s.(mem.Importer); ok {
			if err := i.Forget(e); err != nil {
				return err
			}
		}
		return f.store.Drop(e)
	}
	var all sync.WaitGroup
	for w := range int64(workers) {
		all.Go(func() {
			for round := range int64(rounds) {
				if err := life(f.extent(w*Pages/workers, 1+(w+round)%4), uint64(w*rounds+round)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
}

func imports(t *testing.T, f *fixture) {
	store, s := f.store.(mem.Exporter), f.open().(mem.Importer)
	e := f.extent(4, 2)
	f.back(t, e)
	for _, part := range []mem.Extent{f.extent(4, 1), f.extent(5, 1), f.extent(4, 3), f.extent(30, 2)} {
		if _, err := store.Export(part); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Export(%v) of %v: %v, want ErrInvalid", part, e, err)
		}
	}
	if _, err := s.Map(e, mem.ReadOnly); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("Map before Import: %v, want ErrInvalid", err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Import(e, null); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("Import of another kind of file: %v, want ErrInvalid", err)
	}
	for _, bad := range []mem.Extent{{Offset: 1, Bytes: f.page}, f.extent(63, 2), {}} {
		if err := s.Import(bad, f.export(t, e)); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Import(%v): %v, want ErrInvalid", bad, err)
		}
	}
	if err := s.Import(e, f.export(t, e)); err != nil {
		t.Fatal(err)
	}
	for _, over := range []mem.Extent{e, f.extent(3, 2), f.extent(5, 4)} {
		if err := s.Import(over, f.export(t, e)); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Import(%v) over %v: %v, want ErrInvalid", over, e, err)
		}
	}
	if _, err := s.Map(f.extent(4, 1), mem.ReadOnly); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("Map of a part: %v, want ErrInvalid", err)
	}
	if _, err := s.Map(e, mem.ReadWrite); err != nil {
		t.Fatal(err)
	}
	for _, x := range []mem.Extent{e, f.extent(4, 1), f.extent(20, 1)} {
		if err := s.Forget(x); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Forget(%v) of mapped %v: %v, want ErrInvalid", x, e, err)
		}
	}
	f.unmapped(t, s, e)

	// A descriptor of less memory than the extent.
	large := f.extent(10, 3)
	if err := s.Import(large, f.export(t, e)); err == nil {
		if _, err := s.Map(large, mem.ReadOnly); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("Map of more memory than was imported: %v, want ErrInvalid", err)
		}
	}
}
