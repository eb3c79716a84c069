package memtest_test

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/host"
	"trireme.dev/shared/mem/memtest"
)

// recorder is a test that notes its failures.
type recorder struct {
	testing.TB
	cleanups []func()
	failures []string
}

func (r *recorder) Helper()          {}
func (r *recorder) Cleanup(f func()) { r.cleanups = append(r.cleanups, f) }
func (r *recorder) Errorf(format string, a ...any) {
	r.failures = append(r.failures, fmt.Sprintf(format, a...))
}

func (r *recorder) end() {
	for _, f := range r.cleanups {
		f()
	}
}

func TestTracer(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(*memtest.Tracer)
		want string // in the failure; "" for none
	}{
		"clean":   {func(tr *memtest.Tracer) { tr.Made("a"); tr.Made("a"); tr.Gone("a"); tr.Gone("a") }, ""},
		"left":    {func(tr *memtest.Tracer) { tr.Made("a"); tr.Made("a"); tr.Gone("a") }, "left behind: a made at"},
		"twice":   {func(tr *memtest.Tracer) { tr.Made("a"); tr.Gone("a"); tr.Gone("a") }, "twice: a"},
		"unknown": {func(tr *memtest.Tracer) { tr.Gone("b") }, "never made, or twice: b"},
	} {
		t.Run(name, func(t *testing.T) {
			r := &recorder{TB: t}
			tr := memtest.Trace(r)
			c.do(tr)
			r.end()
			got := strings.Join(r.failures, "\n")
			if (c.want == "") != (got == "") || !strings.Contains(got, c.want) {
				t.Errorf("failures %q, want %q", got, c.want)
			}
			if name == "left" && !strings.Contains(got, "memtest_test.go") {
				t.Errorf("the failure does not say where: %s", got)
			}
		})
	}
}

// TestNoLeaksFinds leaves one thing of each kind behind, in a store that is there before the test and after it.
func TestNoLeaksFinds(t *testing.T) {
	store, err := host.NewStore("planted", 4*mem.HostPage, 4*mem.HostPage, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	old := mem.Extent{Bytes: mem.HostPage} // what is there at the start is nobody's leak
	if err := store.Back(old); err != nil {
		t.Fatal(err)
	}
	spare := open(t, store)
	defer spare.Close()
	e := mem.Extent{Offset: mem.HostPage, Bytes: 2 * mem.HostPage}
	for name, c := range map[string]struct {
		leave func(t *testing.T) (mend func() error)
		want  []string // in the failure; none: it must not fail
	}{
		"nothing": {func(t *testing.T) func() error {
			s := open(t, store)
			_, err := s.Map(old, mem.ReadOnly)
			if err = errors.Join(err, s.Close(), store.Back(e), store.Drop(e)); err != nil {
				t.Fatal(err)
			}
			return func() error { return nil }
		}, nil},
		"a descriptor": {func(t *testing.T) func() error {
			f, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			return f.Close
		}, []string{"1 x fd of " + os.DevNull}},
		"a socket": {func(t *testing.T) func() error {
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			return func() error { return errors.Join(unix.Close(fds[0]), unix.Close(fds[1])) }
		}, []string{"2 x fd of socket"}},
		"a map": {func(t *testing.T) func() error {
			if _, err := spare.Map(old, mem.ReadOnly); err != nil {
				t.Fatal(err)
			}
			return func() error { return spare.Unmap(old) }
		}, []string{"1 x map of /memfd:planted"}},
		"an extent": {func(t *testing.T) func() error {
			if err := store.Back(e); err != nil {
				t.Fatal(err)
			}
			return func() error { return store.Drop(e) }
		}, []string{fmt.Sprint(e.Bytes, " x byte of memory in /memfd:planted")}},
		"a store": {func(t *testing.T) func() error {
			s, err := host.NewStore("lost", mem.HostPage, mem.HostPage, 0)
			if err = errors.Join(err, s.Back(old)); err != nil {
				t.Fatal(err)
			}
			return s.Close
		}, []string{"1 x fd of /memfd:lost", fmt.Sprint(mem.HostPage, " x byte of memory in /memfd:lost")}},
		"a space": {func(t *testing.T) func() error {
			s := open(t, store)
			if _, err := s.Map(old, mem.ReadWrite); err != nil {
				t.Fatal(err)
			}
			return s.Close
		}, []string{"1 x fd of /memfd:planted", "1 x map of /memfd:planted"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := &recorder{TB: t}
			memtest.NoLeaksWithin(r, 20*time.Millisecond)
			mend := c.leave(t)
			r.end()
			if err := mend(); err != nil {
				t.Fatal(err)
			}
			got := strings.Join(r.failures, "\n")
			if (len(c.want) == 0) != (got == "") || strings.Count(got, " x ") != len(c.want) {
				t.Errorf("failures %q, want %q", got, c.want)
			}
			for _, w := range c.want {
				if !strings.Contains(got, w) {
					t.Errorf("failures %q lack %q", got, w)
				}
			}
		})
	}
}

func open(t *testing.T, store *host.Store) *host.Space {
	t.Helper()
	fd, err := unix.FcntlInt(store.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s, err := host.OpenSpace(os.NewFile(uintptr(fd), store.File().Name()), store.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return s
}
