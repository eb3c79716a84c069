package e2e

import (
	"testing"
	"time"

	"trireme.dev/shared/bus/bustest"
)

// The disk under the streams fills up while 16 clients stream, and a while later there is room again: answers are late, and all
// complete and the same.
func TestDiskIsFullForAWhile(t *testing.T) {
	t.Parallel()
	if _, full := disturbances(t, 0, 1); !full {
		t.Skip("SKIPPED: a full disk under a load; set TRIREME_CHAOS=1 to run it. TestDiskIsFull of shared/bus always runs")
	}
	disk := bustest.NewDisk(t, "16m")
	server := bustest.RunAt(t, disk.Dir)
	c := start(t, "--nats-url", server.URL(), "--topology", "1E1P2D", "--threads", "1")
	l := newLoad(t, c)
	l.begin()
	time.Sleep(500 * time.Millisecond) // into the middle of the load
	at := time.Now()
	disk.Fill()
	time.Sleep(5 * time.Second)
	disk.Free()
	l.waitOpen(t)
	l.end(t)
	l.report(t, "disks that were full for 5 s", []time.Time{at.Add(2 * time.Second)})
	c.waitReady(t)
	c.expectNoMemory(t)
}
