package hmm_test

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm"
)

// awaitReady waits until the HMM has readied what it is to.
func awaitReady(t *testing.T, d *hmm.Daemon) hbm.Stats {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		s := d.Stats()
		var unready int64
		for _, space := range s.Spaces {
			unready += space.Unready
		}
		switch {
		case unready == 0:
			return s
		case time.Now().After(end):
			t.Fatalf("%d bytes are not ready after a minute: %+v", unready, s.Spaces)
		}
	}
}

// Memory that is ready counts as kept and not as anybody's, is had by whoever wants it, zeroed, and is made up for.
func TestReadyMemory(t *testing.T) {
	for _, perNPU := range []bool{false, true} {
		t.Run(fmt.Sprintf("perNPU=%t", perNPU), func(t *testing.T) {
			d, socket := daemon(t, func(c *hmm.Config) {
				c.PerNPU, c.Ready, c.CacheBytes, c.Weights = perNPU, 48*page, -1, 16*page
			})
			domains := 1
			if perNPU {
				domains = 2
			}
			expect := func(when string, booked int64) {
				t.Helper()
				s := awaitReady(t, d)
				for i, space := range s.Spaces {
					kept, used := int64(0), int64(0)
					if i > 0 {
						kept = 2 * 48 * page / int64(domains)
					}
					if i == 1 {
						used = booked
						kept = min(kept, (2*64/int64(domains)+16)*page-used)
					}
					if space.Kept != kept || space.Booked != used || space.Resident != kept+used {
						t.Errorf("%s, space %d: %+v, want %d kept, %d booked", when, i, space, kept, used)
					}
				}
			}
			expect("at first", 0)
			c := dial(t, socket, hbm.Hello{NPUs: 1})
			o := alloc(t, c, hbm.Spec{Kind: mem.KindKV, Bytes: 40 * page, NPU: 0})[0]
			if len(bytes.Trim(o.Bytes(), "\x00")) != 0 {
				t.Error("what was ready is not zero")
			}
			expect("with an object", 40*page)
			for i := range o.Bytes() {
				o.Bytes()[i] = 1
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			for end := time.Now().Add(time.Minute); d.Stats().Objects > 0; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("the object stays")
				}
			}
			// What is dropped counts as ready, so no more is taken from the system than before.
			expect("afterwards", 0)
			c = dial(t, socket, hbm.Hello{NPUs: 1})
			o = alloc(t, c, hbm.Spec{Kind: mem.KindKV, Bytes: 60 * page, NPU: 0})[0]
			if len(bytes.Trim(o.Bytes(), "\x00")) != 0 {
				t.Error("what was used before is not zero")
			}
		})
	}
}
