package e2e

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// possessions is what a process has of the system, KiB and numbers.
type possessions struct {
	Resident int // memory in RAM, of which
	Own      int // nobody else has: heap and stacks
	Share    int // is its part of memory that others have mapped, too, and of its own (Pss)
	Maps     int // ranges of addresses that the kernel keeps apart: mapped extents, but for neighbours
	Threads  int
	Files    int
	Routines int // goroutines; 0: it serves no metrics
	Heap     int // of Go, what is alive; 0: as above
}

// possessions looks at a process that is at rest. metrics is where it serves those, or "".
func (c *cluster) possessions(tb testing.TB, pid int, metrics string) (p possessions) {
	tb.Helper()
	if metrics != "" {
		p.Heap = c.alive(tb, metrics)
	}
	read := func(name string) []byte {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			tb.Fatal(err)
		}
		return data
	}
	for line := range bytes.Lines(append(read("status"), read("smaps_rollup")...)) {
		for prefix, n := range map[string]*int{"VmRSS:": &p.Resident, "RssAnon:": &p.Own, "Threads:": &p.Threads, "Pss:": &p.Share} {
			_, _ = fmt.Sscanf(string(line), prefix+" %d", n) // it is another line
		}
	}
	http.DefaultTransport.(*http.Transport).CloseIdleConnections() // they are the test's
	p.Maps = bytes.Count(read("maps"), []byte("\n"))
	p.Files = files(tb, pid)
	if metrics != "" {
		p.Routines = metricAt(tb, metrics, "go_goroutines")
	}
	return p
}

// alive is how many KiB of Go's heap a process at rest cannot let go of. What its last collection has found alive may have been so in the middle
// of an operation, which has both layouts, and there is no other one while nobody asks anything. But to be asked for metrics makes garbage, too,
// so some dozens of questions bring one about. The first that ends may have begun before, and each counts what is made while it goes on: the
// least that one of the next four has found is it.
func (c *cluster) alive(tb testing.TB, metrics string) (kib int) {
	tb.Helper()
	collections := func() int { return metricAt(tb, metrics, "go_gc_duration_seconds_count") }
	begin, deadline := collections(), time.Now().Add(2*time.Minute)
	for after := 2; after <= 5; after++ {
		for collections() < begin+after {
			if time.Now().After(deadline) {
				tb.Fatalf("%s has not collected its garbage %d times in two minutes", metrics, after)
			}
		}
		now := metricAt(tb, metrics, "go_memstats_next_gc_bytes") / 2 >> 10 // GOGC=100
		if kib == 0 || now < kib {
			kib = now
		}
	}
	return kib
}

// estate is what a system has of anything that can grow with changes of an instance, while nobody asks anything.
type estate struct {
	Of        map[string]possessions // by service
	InUse     map[string]int64       // bytes booked by kind, with the padding to pages, without what only a cache keeps
	Resident  int64                  // bytes that the memory files of the HMM take
	Objects   int                    // of the HMM, without those that rest
	Holds     int
	Streams   int
	Consumers int // of all streams, watchers of buckets among them
}

// estate waits until nothing is left of any request.
func (c *cluster) estate(tb testing.TB, js jetstream.JetStream, metrics map[string]string) estate {
	tb.Helper()
	c.expectNoMemory(tb)
	s := c.memory(tb)
	e := estate{Of: map[string]possessions{}, InUse: map[string]int64{}, Objects: s.Objects - s.Resting, Holds: s.Holds}
	for _, account := range append(s.Memory, s.Shared...) {
		for kind, u := range account.Kinds {
			e.InUse[kind] += u.Used + u.Padded - u.Cached
		}
	}
	for _, space := range s.Spaces {
		e.Resident += space.Resident
	}
	for _, p := range c.children() {
		if p.role != "nats" {
			e.Of[p.role] = c.possessions(tb, p.pid, metrics[p.role])
		}
	}
	streams := js.ListStreams(tb.Context())
	for s := range streams.Info() {
		e.Streams++
		e.Consumers += s.State.Consumers
	}
	if err := streams.Err(); err != nil {
		tb.Fatal(err)
	}
	return e
}

// expectNoMore compares with an estate before. How many ranges there are depends on which experts lie side by side. What Go's runtime and HTTP servers keep comes and goes, and memory is given
// back late; but a map, a file or a goroutine left behind by each change is seen after a few of them, and some kilobytes after some hundred. all
// says that weights in use are the same in each layout.
func (e estate) expectNoMore(tb testing.TB, before estate, all bool) {
	tb.Helper()
	for role, now := range e.Of {
		was := before.Of[role]
		tb.Logf("%-8s %+v, before %+v", role, now, was)
		const slack = 8
		if now.Own > 2*was.Own+16<<10 || now.Heap > was.Heap+was.Heap/4+1<<10 || now.Share > was.Share+was.Share/4+32<<10 || now.Maps > 2*was.Maps+32 ||
			now.Threads > was.Threads+slack || now.Files > was.Files+slack || now.Routines > was.Routines+slack {
			tb.Errorf("%s has %+v, before %+v", role, now, was)
		}
	}
	tb.Logf("bytes in use %v, before %v; %d bytes of files, before %d", e.InUse, before.InUse, e.Resident, before.Resident)
	for kind, n := range e.InUse {
		if n != before.InUse[kind] && (all || kind != "weights") {
			tb.Errorf("%d bytes of %s are in use, before %d", n, kind, before.InUse[kind])
		}
	}
	if e.Objects != before.Objects || e.Streams != before.Streams || e.Consumers > before.Consumers || all && e.Holds != before.Holds {
		tb.Errorf("%d objects, %d holds, %d streams and %d consumers; before %d, %d, %d and %d", e.Objects, e.Holds, e.Streams, e.Consumers,
			before.Objects, before.Holds, before.Streams, before.Consumers)
	}
}
