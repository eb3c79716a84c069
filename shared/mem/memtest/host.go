package memtest

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem/host"
)

// Host returns a store of so many bytes and a space on it in this process, both until the end of the test.
func Host(tb testing.TB, bytes int64) (*host.Store, *host.Space) {
	tb.Helper()
	store, err := host.NewStore(tb.Name(), bytes, bytes, bytes)
	if err != nil {
		tb.Fatal(err)
	}
	fd, err := unix.FcntlInt(store.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	space, err := host.OpenSpace(os.NewFile(uintptr(fd), tb.Name()), bytes)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := errors.Join(space.Close(), store.Close()); err != nil {
			tb.Error(err)
		}
	})
	return store, space
}
