package host_test

import (
	"bytes"
	"sync"
	"testing"

	"trireme.dev/shared/mem"
)

func TestReadyGoesBackWhenMemoryIsShort(t *testing.T) {
	s := store(t, 8, 4, 4)
	readied(t, s, 3*page)
	if got, err := s.Resident(); err != nil || got != 3*page || s.Cached() != 3*page {
		t.Fatalf("%d bytes resident, %d kept, want three pages: %v", got, s.Cached(), err)
	}
	for _, x := range []struct{ first, pages, kept, resident int64 }{
		{1, 1, 2, 3}, // what is ready is used up
		{5, 1, 2, 4}, // as much as there may be
		{6, 1, 1, 4}, // one page too much: one that nobody uses goes
	} {
		if err := s.Back(mem.Extent{Offset: x.first * page, Bytes: x.pages * page}); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Resident(); err != nil || got != x.resident*page || s.Cached() != x.kept*page {
			t.Errorf("page %d backed: %d bytes resident, %d kept, want %d and %d pages: %v", x.first, got, s.Cached(), x.resident, x.kept, err)
		}
	}
	if short := s.Unready(3 * page); short != 0 {
		t.Errorf("%d bytes unready, of a store that has as much as it may", short)
	}
	if err := s.Drop(mem.Extent{Offset: 5 * page, Bytes: page}); err != nil {
		t.Fatal(err)
	}
	if err := s.Back(mem.Extent{Offset: 0, Bytes: page}); err != nil { // the lowest was spared
		t.Fatal(err)
	}
	if got, err := s.Resident(); err != nil || got != 4*page || s.Cached() != page {
		t.Errorf("%d bytes resident, %d kept, want four pages and one: %v", got, s.Cached(), err)
	}
}

// One Ready takes no more than a few MiB, whatever is missing: whoever calls it again and again ends soon.
func TestReadyTakesLittleAtATime(t *testing.T) {
	const pages = 16 << 20 / page
	s := store(t, pages, pages, 0)
	if more, err := s.Ready(pages * page); !more || err != nil {
		t.Fatalf("%t, %v", more, err)
	}
	if got, err := s.Resident(); err != nil || got == 0 || got > 4<<20 {
		t.Errorf("%d bytes resident, %v", got, err)
	}
}

// Memory is given out, written and taken back while it is being readied: it reads as zeros at first, and keeps what was written.
func TestReadyBesideUse(t *testing.T) {
	const pages, users, rounds = 512, 4, 60
	s := store(t, pages, pages, pages/8)
	sp := space(t, s)
	stop := make(chan struct{})
	var readier, all sync.WaitGroup
	readier.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := s.Ready(pages / 2 * page); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for u := range int64(users) {
		all.Go(func() {
			for i := range int64(rounds) {
				e := mem.Extent{Offset: (u*pages/users + i%7) * page, Bytes: (1 + i%50) * page}
				if err := s.Back(e); err != nil {
					t.Error(err)
					return
				}
				if _, err := sp.Map(e, mem.ReadWrite); err != nil {
					t.Error(err)
					return
				}
				p := sp.Bytes(e)
				if len(bytes.Trim(p, "\x00")) != 0 {
					t.Errorf("%v is not zero", e)
				}
				want := bytes.Repeat([]byte{byte(1 + u), byte(i), 3, 4}, len(p)/4)
				copy(p, want)
				if !bytes.Equal(p, want) {
					t.Errorf("%v has lost what was written", e)
				}
				if err := sp.Unmap(e); err != nil {
					t.Error(err)
				}
				if err := s.Drop(e); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	close(stop)
	readier.Wait()
	if got, err := s.Resident(); err != nil || got != s.Cached() {
		t.Errorf("%d bytes resident and %d kept, with none in use: %v", got, s.Cached(), err)
	}
}
