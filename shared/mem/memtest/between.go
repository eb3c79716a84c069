package memtest

import (
	"testing"

	"trireme.dev/shared/mem"
)

// The tests of memory between processes. The test itself is the owner: it has the store, and maps nothing.

func otherProcessSees(t *testing.T, f *fixture) {
	writer, reader := f.start(t), f.start(t)
	a, b := f.extent(7, 2), f.extent(20, 5)
	for i, e := range []mem.Extent{a, b} {
		f.back(t, e)
		writer.mapped(t, e, mem.ReadWrite)
		writer.fill(t, e, uint64(i))
		reader.mapped(t, e, mem.ReadOnly)
		reader.sees(t, e, uint64(i))
	}
	writer.fill(t, a, 7)
	reader.sees(t, a, 7)
	reader.sees(t, b, 1)
	writer.unmapped(t, a)
	reader.sees(t, a, 7)
	writer.exit(t)
	reader.sees(t, b, 1)
	reader.unmapped(t, a)
	reader.exit(t)
}

func killedWriter(t *testing.T, f *fixture) {
	writer, reader := f.start(t), f.start(t)
	e := f.extent(0, 8)
	f.back(t, e)
	writer.mapped(t, e, mem.ReadWrite)
	writer.fill(t, e, 5)
	writer.kill()

	reader.mapped(t, e, mem.ReadWrite)
	reader.sees(t, e, 5)
	reader.unmapped(t, e)
	if err := f.store.Drop(e); err != nil {
		t.Fatal(err)
	}
	f.back(t, e)
	reader.mapped(t, e, mem.ReadOnly)
	reader.seesZeros(t, e)
	reader.exit(t)
}

func generations(t *testing.T, f *fixture) {
	first, second := f.start(t), f.start(t)
	e := f.extent(9, 3)
	f.back(t, e)
	at := first.mapped(t, e, mem.ReadWrite)
	first.fill(t, e, 1)
	first.unmapped(t, e)
	if err := f.store.Drop(e); err != nil {
		t.Fatal(err)
	}

	f.back(t, e)
	second.mapped(t, e, mem.ReadWrite)
	second.seesZeros(t, e)
	second.fill(t, e, 2)
	if again := first.mapped(t, e, mem.ReadOnly); again != at {
		t.Errorf("the next generation is mapped at %#x, the one before was at %#x", again, at)
	}
	first.sees(t, e, 2)
	first.exit(t)
	second.exit(t)
}

func readOnly(t *testing.T, f *fixture) {
	writer, reader := f.start(t), f.start(t)
	e := f.extent(1, 2)
	f.back(t, e)
	writer.mapped(t, e, mem.ReadOnly)
	writer.must(t, command{Op: "protect", Extent: e, Access: mem.ReadWrite}, nil)
	writer.fill(t, e, 1)
	reader.mapped(t, e, mem.ReadOnly)
	reader.sees(t, e, 1)
	if a := reader.do(t, command{Op: "fill", Extent: e, Seed: 2}, nil); a.Err == "" {
		t.Error("a read-only mapping can be written")
	}
	writer.sees(t, e, 1)
	writer.must(t, command{Op: "protect", Extent: e, Access: mem.ReadOnly}, nil)
	if a := writer.do(t, command{Op: "fill", Extent: e, Seed: 3}, nil); a.Err == "" {
		t.Error("a mapping protected again can be written")
	}
	reader = f.start(t) // where a fault costs a process the device, the one that was refused is of no more use
	reader.mapped(t, e, mem.ReadOnly)
	reader.sees(t, e, 1)
	reader.exit(t)
}

func noAccessUnmapped(t *testing.T, f *fixture) {
	p := f.start(t)
	e, next := f.extent(1, 2), f.extent(3, 1)
	f.back(t, e)
	f.back(t, next)
	p.mapped(t, e, mem.ReadWrite)
	p.mapped(t, next, mem.ReadWrite)
	p.fill(t, e, 1)
	p.fill(t, next, 2)
	p.must(t, command{Op: "unmap", Extent: e}, nil)
	p.sees(t, next, 2)
	if a := p.do(t, command{Op: "sum", Extent: e}, nil); a.Err == "" {
		t.Error("an unmapped extent can be read")
	}
}

// noAccessBeforeMap: an extent that others have mapped is out of reach until this process maps it too.
func noAccessBeforeMap(t *testing.T, f *fixture) {
	owner, p := f.start(t), f.start(t)
	e, next := f.extent(1, 2), f.extent(3, 1)
	f.back(t, e)
	f.back(t, next)
	owner.mapped(t, e, mem.ReadWrite)
	owner.fill(t, e, 1)
	at := p.mapped(t, next, mem.ReadWrite) // tells where e will be
	p.fill(t, next, 2)
	if a := p.do(t, command{Op: "sum", Extent: e, At: at - uint64(e.Bytes)}, nil); a.Err == "" {
		t.Error("an extent that was never mapped can be read")
	}
	p = f.start(t) // see readOnly
	if at := p.mapped(t, next, mem.ReadWrite); p.mapped(t, e, mem.ReadOnly) != at-uint64(e.Bytes) {
		t.Error("the extent lies elsewhere: the test looked in the wrong place")
	}
	p.sees(t, e, 1)
	p.exit(t)
	owner.exit(t)
}

// staleMap: on a backend with an allocation an extent, one who failed to unmap does not see the next generation.
func staleMap(t *testing.T, f *fixture) {
	stale, next := f.start(t), f.start(t)
	e := f.extent(30, 2)
	f.back(t, e)
	stale.mapped(t, e, mem.ReadWrite)
	stale.fill(t, e, 1)
	if err := f.store.Drop(e); err != nil {
		t.Fatal(err)
	}
	f.back(t, e)
	next.mapped(t, e, mem.ReadWrite)
	next.fill(t, e, 2)
	stale.sees(t, e, 1)
	stale.fill(t, e, 3)
	next.sees(t, e, 2)
	stale.exit(t)
	next.sees(t, e, 2)
	next.exit(t)
}
