package engine_test

import (
	"errors"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/kernel"
)

// counted counts the scratch that is taken from a Compute, and has no room for more than most.
type counted struct {
	kernel.Compute
	floats *atomic.Int64
	most   int64
}

func (c *counted) Alloc(n int) ([]float32, error) {
	if c.floats.Add(int64(n)) > c.most {
		c.floats.Add(int64(-n))
		return nil, kernel.ErrNoMemory
	}
	return c.Compute.Alloc(n)
}

func (c *counted) Free(scratch []float32) {
	c.floats.Add(int64(-len(scratch)))
	c.Compute.Free(scratch)
}

// resident is the memory of this process that is no file's, after a collection.
func resident(t *testing.T) int64 {
	debug.FreeOSMemory()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kb << 10
		}
	}
	t.Fatal("no RssAnon in /proc/self/status")
	return 0
}

// A Text, and an Encoder, that is closed has given all of its scratch back: after two hundred of them on changing NPUs, beside one
// that stays, there is as much as before. Nor does one that cannot be made for want of room keep what it has taken.
func TestScratchIsGivenBack(t *testing.T) {
	var floats atomic.Int64
	r := newRig(t, shapesModel, &counted{single(), &floats, 1 << 40}, engine.Limits{Rows: 8, Seqs: 2})
	npus := make([]engine.NPU, 5)
	for i := range npus {
		c := &counted{single(), &floats, 1 << 40}
		t.Cleanup(func() { c.Close() })
		npus[i] = engine.NPU{Compute: c, Weights: r.w}
	}
	lim := engine.Limits{Rows: 512, Seqs: 8}
	batch := []engine.Seq{{Tokens: []int32{1, 2, 3}, Blocks: r.blocks(3), Want: true}}
	build := func(count int) int64 {
		before := floats.Load()
		text, err := engine.NewText(r.cfg, npus[:count], lim)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := text.Forward(batch); err != nil {
			t.Fatal(err)
		}
		enc, err := engine.NewEncoder(r.cfg, r.w, npus[count-1].Compute, 64)
		if err != nil {
			t.Fatal(err)
		}
		took := floats.Load() - before
		text.Close()
		enc.Close()
		if left := floats.Load() - before; left != 0 {
			t.Fatalf("%d floats of scratch are left of %d NPUs, which had %d", left, count, took)
		}
		return took
	}
	one := build(4)
	before := resident(t)
	for i := range 200 {
		build([]int{1, 2, 4, 3, 5}[i%5])
	}
	if now := resident(t); now > before+4*one {
		t.Errorf("resident memory has gone from %d to %d bytes, the scratch of four NPUs is %d", before, now, 4*one)
	}

	held := floats.Load()
	text, err := engine.Reserve(r.cfg, []engine.NPU{{Compute: npus[0].Compute}}, lim)
	if err != nil {
		t.Fatal(err)
	}
	if floats.Load() == held {
		t.Error("scratch is not there before the weights are")
	}
	text.Close()
	wrong := *r.w
	wrong.Norm = wrong.Norm[1:]
	if _, err := engine.NewText(r.cfg, []engine.NPU{npus[0], {Compute: npus[1].Compute, Weights: &wrong}}, lim); !errors.Is(err, engine.ErrModel) {
		t.Errorf("weights of another shape: %v", err)
	}
	if now := floats.Load(); now != held {
		t.Errorf("%d floats of scratch are left of what had no weights", now-held)
	}
	for _, room := range []int64{0, 1000, 100_000, one / 8} {
		npus[1].Compute.(*counted).most = held + room
		if _, err := engine.NewText(r.cfg, npus[:3], lim); !errors.Is(err, kernel.ErrNoMemory) {
			t.Errorf("an NPU with room for %d floats: %v", room, err)
		}
		if _, err := engine.NewEncoder(r.cfg, r.w, npus[1].Compute, 4096); !errors.Is(err, kernel.ErrNoMemory) {
			t.Errorf("an encoder on an NPU with room for %d floats: %v", room, err)
		}
		if now := floats.Load(); now != held {
			t.Errorf("%d floats of scratch are left of what could not be made", now-held)
		}
	}
}
