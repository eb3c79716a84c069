package host

import (
	"cmp"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem"
)

// What happens to pages while Ready takes their memory.
func TestTakenMeanwhile(t *testing.T) {
	first := mem.Extent{Bytes: mem.HostPage}
	all := mem.Extent{Bytes: 3 * mem.HostPage}
	for _, x := range []struct {
		name               string
		keep, limit        int64 // pages; limit 0: 8
		meanwhile          func(*Store) error
		before             int64 // pages with memory then, before Ready has taken any
		live, kept, unread int64 // pages
	}{
		{name: "nothing", kept: 3},
		{name: "given out", meanwhile: func(s *Store) error { return s.Back(first) }, before: 1, live: 1, kept: 2, unread: 1},
		{name: "others given out, for which there is no room beside", limit: 3, meanwhile: func(s *Store) error {
			return s.Back(mem.Extent{Offset: 5 * mem.HostPage, Bytes: mem.HostPage})
		}, before: 1, live: 1, kept: 2},
		{name: "given out and dropped", meanwhile: func(s *Store) error {
			if err := s.Back(first); err != nil {
				return err
			}
			return s.Drop(first)
		}, kept: 2, unread: 1},
		{name: "given out, and dropped where what is coming leaves no room", keep: 2, meanwhile: func(s *Store) error {
			if err := s.Back(first); err != nil {
				return err
			}
			return s.Drop(first)
		}, kept: 2, unread: 1},
		{name: "given out, dropped and kept", keep: 3, meanwhile: func(s *Store) error {
			if err := s.Back(first); err != nil {
				return err
			}
			return s.Drop(first)
		}, before: 1, kept: 3},
		{name: "trimmed", meanwhile: func(s *Store) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.trim(s.idle())
			return nil
		}, unread: 3},
	} {
		for _, ok := range []bool{true, false} {
			s, err := NewStore("test", 8*mem.HostPage, cmp.Or(x.limit, 8)*mem.HostPage, x.keep*mem.HostPage)
			if err != nil {
				t.Fatal(err)
			}
			e, more := s.wanted(3 * mem.HostPage)
			if e != all || !more {
				t.Fatalf("%v, %t are wanted", e, more)
			}
			if x.meanwhile != nil {
				if err := x.meanwhile(s); err != nil {
					t.Fatal(err)
				}
			}
			if got, err := s.Resident(); err != nil || got != x.before*mem.HostPage { // nobody relies on Ready
				t.Errorf("%s: %d bytes resident before any is ready, want %d pages: %v", x.name, got, x.before, err)
			}
			if err := s.take(e); err != nil {
				t.Fatal(err)
			}
			if err := s.taken(e, ok); err != nil {
				t.Fatal(err)
			}
			kept := x.kept
			if !ok { // then only what was dropped is kept
				kept = 0
				if x.keep == 3 {
					kept = 1
				}
			}
			got, err := s.Resident()
			if err != nil || got != (x.live+kept)*mem.HostPage || s.Cached() != kept*mem.HostPage || s.bytes[live] != x.live*mem.HostPage || s.bytes[coming] != 0 {
				t.Errorf("%s, %t: %d bytes resident, %v, want %d pages live and %d kept: %v", x.name, ok, got, s.bytes, x.live, kept, err)
			}
			if short := s.Unready(3 * mem.HostPage); ok && short != x.unread*mem.HostPage {
				t.Errorf("%s: %d bytes unready, want %d pages", x.name, short, x.unread)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// Memory that is taken away while Ready is about to touch it, when the system has no other, is an error and brings nobody down. Behind the end
// of the file there is none.
func TestTouchWithoutMemory(t *testing.T) {
	s, err := NewStore("test", mem.HostPage, mem.HostPage, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.touch(mem.Extent{Offset: mem.HostPage, Bytes: mem.HostPage}); !errors.Is(err, unix.EFAULT) {
		t.Errorf("in one call: %v", err)
	}
	p, err := unix.Mmap(int(s.file.Fd()), 0, 2*mem.HostPage, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(p) //nolint:errcheck // a test's own
	if err := touchEach(p); !errors.Is(err, unix.EFAULT) {
		t.Errorf("page by page: %v", err)
	}
	p[1] = 7
	if err := touchEach(p[:mem.HostPage]); err != nil || p[1] != 7 {
		t.Errorf("page by page, where there is memory: %v, %d", err, p[1])
	}
	if got, err := s.Resident(); err != nil || got != mem.HostPage {
		t.Errorf("%d bytes resident, %v", got, err)
	}
}
