package host_test

import (
	"errors"
	"maps"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/host"
	"trireme.dev/shared/mem/memtest"
)

const page = mem.HostPage

func store(t testing.TB, pages, limit, keep int64) *host.Store {
	t.Helper()
	s, err := host.NewStore("test", pages*page, limit*page, keep*page)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func dup(t testing.TB, f *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), f.Name())
}

func space(t testing.TB, s *host.Store) *host.Space {
	t.Helper()
	sp, err := host.OpenSpace(dup(t, s.File()), s.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sp.Close(); err != nil {
			t.Error(err)
		}
	})
	return sp
}

// readied has a store ready bytes.
func readied(t testing.TB, s *host.Store, bytes int64) {
	t.Helper()
	for more := true; more; {
		var err error
		if more, err = s.Ready(bytes); err != nil {
			t.Fatal(err)
		}
	}
	if s.Unready(bytes) != 0 {
		t.Fatalf("%d of %d bytes are not ready, and Ready has nothing to do", s.Unready(bytes), bytes)
	}
}

// backend is the host's for the suite, with stores that keep so many freed pages, and have so many ready.
func backend(keep, ready int64) memtest.Backend {
	return memtest.Backend{
		New: func(t *testing.T) (mem.Store, func() mem.Space) {
			s := store(t, memtest.Pages, memtest.Pages, keep)
			readied(t, s, ready*page)
			return s, func() mem.Space { return space(t, s) }
		},
		File: func(s mem.Store) *os.File { return s.(*host.Store).File() },
		Open: func(f *os.File, bytes int64) (mem.Space, error) { return host.OpenSpace(f, bytes) },
	}
}

func TestMain(m *testing.M) { os.Exit(memtest.Main(m, backend(0, 0))) }

func TestConformance(t *testing.T) {
	for name, x := range map[string]struct{ keep, ready int64 }{
		"punching": {}, "caching": {keep: memtest.Pages}, "some": {keep: 3},
		"readied": {ready: memtest.Pages}, "readied and caching": {keep: memtest.Pages, ready: memtest.Pages / 2},
	} {
		t.Run(name, func(t *testing.T) { memtest.Run(t, backend(x.keep, x.ready)) })
	}
}

func TestMemoryGoesBack(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		const total, limit, keep = 32, 20, 6
		s, err := host.NewStore("test", total*page, limit*page, keep*page)
		if err != nil {
			r.Fatal(err)
		}
		defer s.Close()
		live := map[int64]mem.Extent{}
		var used int64
		r.Repeat(map[string]func(*rapid.T){
			"back": func(r *rapid.T) {
				e := mem.Extent{Offset: page * rapid.Int64Range(0, total-1).Draw(r, "at"), Bytes: page * rapid.Int64Range(1, 6).Draw(r, "pages")}
				want := e.Check(page, total*page) == nil
				for _, o := range live {
					want = want && (e.Offset >= o.Offset+o.Bytes || o.Offset >= e.Offset+e.Bytes)
				}
				if err := s.Back(e); want != (err == nil) {
					r.Fatalf("Back(%v) = %v with %v in use", e, err, live)
				}
				if want {
					live[e.Offset] = e
					used += e.Bytes
				}
			},
			"drop": func(r *rapid.T) {
				if len(live) == 0 {
					r.Skip("nothing in use")
				}
				at := rapid.SampledFrom(slices.Sorted(maps.Keys(live))).Draw(r, "at")
				if err := s.Drop(live[at]); err != nil {
					r.Fatal(err)
				}
				used -= live[at].Bytes
				delete(live, at)
			},
			"ready": func(r *rapid.T) {
				want := page * rapid.Int64Range(0, keep).Draw(r, "kept")
				short := s.Unready(want)
				if most := min(want-s.Cached(), limit*page-used-s.Cached()); short != max(0, most) {
					r.Fatalf("%d bytes unready of %d, with %d in use and %d cached", short, want, used, s.Cached())
				}
				before := s.Cached()
				more, err := s.Ready(want)
				if err != nil || more != (short > 0) || s.Cached() < before || s.Cached() > before+short || more && s.Cached() == before {
					r.Fatalf("Ready(%d) = %t, %v: %d cached, before %d, %d were unready", want, more, err, s.Cached(), before, short)
				}
			},
			"": func(r *rapid.T) {
				if got, err := s.Resident(); err != nil || got != used+s.Cached() {
					r.Fatalf("%d bytes resident, %d in use and %d cached: %v", got, used, s.Cached(), err)
				}
				if s.Cached() > keep*page || used+s.Cached() > max(limit*page, used) {
					r.Fatalf("%d bytes cached beside %d in use", s.Cached(), used)
				}
			},
		})
	})
}

func TestResidentOfAClosedStore(t *testing.T) {
	s := store(t, 1, 1, 0)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resident(); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("Resident of a closed store: %v, want ErrInvalid", err)
	}
}

func TestNeighboursMergeIntoOneMap(t *testing.T) {
	s := store(t, 1000, 1000, 0)
	sp := space(t, s)
	before := len(memtest.Maps(t))
	for i := range int64(1000) {
		e := mem.Extent{Offset: i * page, Bytes: page}
		if err := s.Back(e); err != nil {
			t.Fatal(err)
		}
		if _, err := sp.Map(e, mem.ReadWrite); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(memtest.Maps(t)) - before; got != 1 {
		t.Errorf("1000 neighbouring extents take %d maps, want 1", got)
	}
	if sp.Mapped() != 1000 {
		t.Errorf("Mapped() = %d", sp.Mapped())
	}
}

func TestFileCannotBeCut(t *testing.T) {
	s := store(t, 4, 4, 0)
	if err := s.File().Truncate(0); err == nil {
		t.Error("a holder of the descriptor can cut the file under everyone's maps")
	}
}

func TestOpenSpaceChecksTheFile(t *testing.T) {
	memtest.NoLeaks(t)
	s := store(t, 4, 4, 0)
	if _, err := host.OpenSpace(dup(t, s.File()), 8*page); err == nil {
		t.Error("a space larger than its file was opened")
	}
	if _, err := host.OpenSpace(dup(t, s.File()), page+1); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("a space of a broken page: %v", err)
	}
}

func TestTable(t *testing.T) {
	memtest.NoLeaks(t)
	tab, err := host.NewTable("test-table", 512)
	if err != nil {
		t.Fatal(err)
	}
	defer tab.Close()
	v, err := host.OpenView(dup(t, tab.File()), 512)
	if err != nil {
		t.Fatal(err)
	}
	tab.Store(511, 7)
	if got := v.Load(511); got != 7 {
		t.Errorf("Load(511) = %d, want 7", got)
	}
	if got := v.Load(0); got != 0 {
		t.Errorf("Load(0) = %d, want 0", got)
	}
	if _, err := unix.Mmap(int(tab.File().Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
		t.Error("a holder of the descriptor can map the table for writing")
	}
	if _, err := unix.Pwrite(int(tab.File().Fd()), []byte{1}, 0); err == nil {
		t.Error("a holder of the descriptor can write the table")
	}
	if _, err := host.OpenView(dup(t, tab.File()), 100_000); err == nil {
		t.Error("a view larger than its table was opened")
	}
}
