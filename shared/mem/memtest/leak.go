// Package memtest holds what tests of device memory share: the conformance suite that every backend of shared/mem
// passes, and a tracer that fails a test which leaves maps or file descriptors behind. It is not for production code.
package memtest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// NoLeaks fails t when at its end the process has memory files mapped or descriptors open that it did not have at the
// call, or a memory file that it had open then holds more memory: an extent that nobody dropped. Call it before anything
// that registers clean-ups which close things. Tests that use it must not run in parallel, and a store that keeps freed
// memory is to be made after the call.
func NoLeaks(t testing.TB) {
	t.Helper()
	noLeaks(t, 5*time.Second)
}

// noLeaks gives what was closed in another process or goroutine, and views that the collector unmaps, so much time.
func noLeaks(t testing.TB, patience time.Duration) {
	t.Helper()
	startPoller(t)
	before := mustHeld(t)
	t.Cleanup(func() {
		var left []string
		for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
			runtime.GC()
			if left = added(before, mustHeld(t)); len(left) == 0 {
				return
			}
		}
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	})
}

// startPoller has Go's runtime open the descriptors of its poller, which it does at first use and keeps.
func startPoller(t testing.TB) {
	t.Helper()
	r, w, err := os.Pipe()
	if err == nil {
		err = errors.Join(r.Close(), w.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func mustHeld(t testing.TB) map[string]int {
	t.Helper()
	found, err := held()
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// held lists the process's descriptors and its maps of memfds, with how often each is there, and the bytes in memfds.
func held() (map[string]int, error) {
	found := map[string]int{}
	counted := map[uint64]bool{} // memfds, by inode: several descriptors share their memory
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, fmt.Errorf("listing descriptors: %w", err)
	}
	for _, e := range dir {
		to, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name()))
		if err != nil {
			continue // the one that reads the directory
		}
		kind, _, _ := strings.Cut(to, ":[") // sockets and pipes by kind: their numbers say nothing
		found["fd of "+kind]++
		if !strings.HasPrefix(to, "/memfd:") {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join("/proc/self/fd", e.Name()), &st); err != nil {
			continue // closed meanwhile
		}
		if !counted[st.Ino] {
			counted[st.Ino] = true
			found["byte of memory in "+to] += int(st.Blocks) * 512 // stat(2)'s unit
		}
	}
	maps, err := mapsOfMemfds()
	if err != nil {
		return nil, err
	}
	for _, m := range maps {
		found["map of "+m.File]++
	}
	return found, nil
}

func added(before, after map[string]int) []string {
	var left []string
	for what, n := range after {
		if extra := n - before[what]; extra > 0 {
			left = append(left, fmt.Sprintf("%d x %s", extra, what))
		}
	}
	slices.Sort(left)
	return left
}

// Map is one line of /proc/self/maps that belongs to a memfd.
type Map struct {
	Start, End uintptr
	Perm       string // as in "rw-s"
	File       string // "/memfd:NAME (deleted)"
}

// Maps lists the memfd maps of this process.
func Maps(t testing.TB) []Map {
	t.Helper()
	maps, err := mapsOfMemfds()
	if err != nil {
		t.Fatal(err)
	}
	return maps
}

func mapsOfMemfds() ([]Map, error) {
	text, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return nil, fmt.Errorf("reading the maps: %w", err)
	}
	var maps []Map
	for line := range strings.Lines(string(text)) {
		at := strings.Index(line, "/memfd:")
		if at < 0 {
			continue
		}
		m := Map{File: strings.TrimSpace(line[at:])}
		if _, err := fmt.Sscanf(line, "%x-%x %s", &m.Start, &m.End, &m.Perm); err != nil {
			return nil, fmt.Errorf("reading map %q: %w", line, err)
		}
		maps = append(maps, m)
	}
	return maps, nil
}
