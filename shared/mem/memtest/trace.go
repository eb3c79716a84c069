package memtest

import (
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
)

// Tracer finds what a backend made and never gave back, by where it was made; it does for resources that only a driver
// knows what NoLeaks does for those of the system.
type Tracer struct {
	t testing.TB

	mu   sync.Mutex
	live map[string][]string // stacks of their making, by name
}

// Trace returns a tracer that fails t when at its end something is left. Call it before anything that registers clean-ups
// which close things.
func Trace(t testing.TB) *Tracer {
	tr := &Tracer{t: t, live: map[string][]string{}}
	t.Cleanup(func() {
		tr.mu.Lock()
		defer tr.mu.Unlock()
		var left []string
		for what, stacks := range tr.live {
			for _, s := range stacks {
				left = append(left, what+" made at\n"+s)
			}
		}
		if slices.Sort(left); len(left) > 0 {
			t.Errorf("left behind: %s", strings.Join(left, "\n"))
		}
	})
	return tr
}

// Made records a resource.
func (tr *Tracer) Made(what string) {
	stack := string(debug.Stack())
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.live[what] = append(tr.live[what], stack)
}

// Gone records that a resource was given back; it fails the test when there is no such resource.
func (tr *Tracer) Gone(what string) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	switch n := len(tr.live[what]); n {
	case 0:
		tr.t.Errorf("given back and never made, or twice: %s\n%s", what, debug.Stack())
	case 1:
		delete(tr.live, what)
	default:
		tr.live[what] = tr.live[what][:n-1]
	}
}
