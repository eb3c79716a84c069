package memtest_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

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

func TestNoLeaksFindsADescriptor(t *testing.T) {
	r := &recorder{TB: t}
	memtest.NoLeaks(r)
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r.end()
	if len(r.failures) != 1 || !strings.Contains(r.failures[0], os.DevNull) {
		t.Errorf("failures %q, want one about %s", r.failures, os.DevNull)
	}
}
