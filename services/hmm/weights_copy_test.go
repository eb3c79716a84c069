package hmm_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm"
)

// some is a part of a set, by number.
func some(set hbm.WeightSet, numbers ...int) hbm.WeightSet {
	part := hbm.WeightSet{Key: set.Key, Part: set.Part, Pace: set.Pace, Numbers: numbers}
	for _, n := range numbers {
		part.Sizes = append(part.Sizes, set.Sizes[n])
	}
	return part
}

// checkSome compares the objects of a part of a set.
func checkSome(t *testing.T, w *hbm.Weights, domain int) {
	t.Helper()
	for i, o := range w.Objects {
		h := w.Handles[i]
		if string(o) != string(content(w.Numbers[i], h.Bytes)) || !h.Sealed || h.CRC != mem.Checksum(o) || w.Extents[i].Space != domain {
			t.Errorf("object %d is %+v in %v, or has other content", w.Numbers[i], h, w.Extents[i])
		}
	}
}

// TestWeightsAreCopied has a second domain get by copy what the first one has, and from the files what it has not; a third part,
// wanted by two, is made once.
func TestWeightsAreCopied(t *testing.T) {
	d, socket := daemon(t, perNPU)
	set := tenWeights()
	c := dial(t, socket, hbm.Hello{})
	var made atomic.Int64
	_, err := c.OpenWeights(t.Context(), 0, some(set, 0, 2, 4, 6, 8), writing(&made), nil)
	must(t, err)
	var last atomic.Int64
	w, err := c.OpenWeights(t.Context(), 1, some(set, 2, 3, 4, 8), writing(&made), func(done, _ int64) { last.Store(done) })
	must(t, err)
	checkSome(t, w, 2)
	bytes := set.Sizes[2] + set.Sizes[4] + set.Sizes[8]
	if w.Copied != 3 || w.Filled != 1 || w.CopiedBytes != bytes || w.FilledBytes != set.Sizes[3] || made.Load() != 6 || last.Load() != w.Bytes {
		t.Errorf("%d objects of %d bytes were copied, %d filled; %d made in all; %d bytes told", w.Copied, w.CopiedBytes, w.Filled, made.Load(), last.Load())
	}
	s := d.Stats()
	if s.Copied != bytes || len(s.Weights) != 2 || s.Weights[1].Objects != 4 || s.Shared[1].Used != w.Bytes || s.Shared[1].Cached != 0 {
		t.Errorf("stats are %+v", s)
	}
	must(t, w.Drop(3, 8))
	if s := d.Stats(); s.Shared[1].Cached == 0 || s.Weights[1].Objects != 4 {
		t.Errorf("what was dropped does not rest: %+v", s.Shared[1])
	}
	again, err := c.OpenWeights(t.Context(), 1, some(set, 3, 8), never, nil)
	must(t, err)
	checkSome(t, again, 2)
	must(t, errors.Join(again.Close(), w.Close()))
	if s := d.Stats(); s.Shared[1].Cached != s.Shared[1].Used+s.Shared[1].Padded {
		t.Errorf("somebody holds weights: %+v", s.Shared[1])
	}

	var wg sync.WaitGroup
	for i := range 4 {
		other := dial(t, socket, hbm.Hello{Instance: fmt.Sprint("i", i)})
		wg.Go(func() {
			w, err := other.OpenWeights(t.Context(), i%2, set, writing(&made), nil)
			if err != nil {
				t.Error(err)
				return
			}
			checkSome(t, w, i%2+1)
		})
	}
	wg.Wait()
	if n := made.Load(); n < 10 || n > 14 { // each once; what both domains begin with at once has no source
		t.Errorf("%d objects were made", n)
	}
}

// TestWrongWeightsAreNotCopied damages a source: the copy is made from the files, and so is the source for whoever wants it next.
func TestWrongWeightsAreNotCopied(t *testing.T) {
	_, socket := daemon(t, perNPU)
	set := tenWeights()
	maker := dial(t, socket, hbm.Hello{Instance: "maker"})
	var made atomic.Int64
	first, err := maker.OpenWeights(t.Context(), 0, set, writing(&made), nil)
	must(t, err)
	must(t, unix.Mprotect(first.Objects[4][:page], unix.PROT_READ|unix.PROT_WRITE))
	first.Objects[4][3] ^= 1
	c := dial(t, socket, hbm.Hello{Instance: "taker"})
	made.Store(0)
	w, err := c.OpenWeights(t.Context(), 1, set, writing(&made), nil)
	must(t, err)
	checkWeights0(t, w, set, 2)
	if made.Load() != 1 || w.Copied != 9 {
		t.Errorf("%d objects were made, %d copied", made.Load(), w.Copied)
	}
	w, err = c.OpenWeights(t.Context(), 0, set, never, nil) // by a copy in the other direction
	must(t, err)
	checkWeights0(t, w, set, 1)
	if w.Copied != 1 {
		t.Errorf("%d objects were copied back", w.Copied)
	}
}

func checkWeights0(t *testing.T, w *hbm.Weights, set hbm.WeightSet, domain int) {
	t.Helper()
	if len(w.Objects) != len(set.Sizes) {
		t.Fatalf("%d objects of %d", len(w.Objects), len(set.Sizes))
	}
	checkSome(t, w, domain)
}

// slow is a set that takes days to copy.
func slow() hbm.WeightSet {
	set := tenWeights()
	set.Pace = hbm.NewPacer(1)
	return set
}

// copySlowly is the child that is in the middle of copying, for ever.
func copySlowly(ctx context.Context, c *hbm.Client) {
	go c.OpenWeights(ctx, 1, slow(), never, nil)
}

// copying waits until somebody copies in the second domain.
func copying(t *testing.T, d *hmm.Daemon) {
	t.Helper()
	eventually(t, "weights are being copied", func() bool {
		s := d.Stats()
		return len(s.Weights) == 2 && s.Weights[1].Holders == 1 && s.Weights[1].Loaded == 0
	})
}

// TestCopyEnds cancels an attach, and kills another, in the middle of copying: nothing is left, no hold on the source either, and the
// next one succeeds.
func TestCopyEnds(t *testing.T) {
	d, socket := daemon(t, perNPU)
	set := tenWeights()
	var made atomic.Int64
	maker := dial(t, socket, hbm.Hello{Instance: "maker"})
	source, err := maker.OpenWeights(t.Context(), 0, set, writing(&made), nil)
	must(t, err)
	clean := func() bool {
		s := d.Stats()
		return len(s.Weights) == 1 && s.Weights[0].Holders == 1 && s.Shared[1].Used+s.Shared[1].Padded == 0
	}
	c := dial(t, socket, hbm.Hello{Instance: "cancelled"})
	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() {
		_, err := c.OpenWeights(ctx, 1, slow(), never, nil)
		failed <- err
	}()
	copying(t, d)
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) || !clean() {
		t.Errorf("a cancelled attach: %v; it left %+v, %+v", err, d.Stats().Weights, d.Stats().Shared)
	}
	child, _ := start(t, "copier", socket)
	copying(t, d)
	kill(t, child)
	eventually(t, "a killed attach leaves nothing", clean)
	w, err := c.OpenWeights(t.Context(), 1, set, never, nil)
	must(t, err)
	checkSome(t, w, 2)
	must(t, source.Close())
}

// TestWeightsComeAndGo attaches and drops 200 times: memory and maps are where they were.
func TestWeightsComeAndGo(t *testing.T) {
	d, socket := daemon(t, perNPU)
	set := tenWeights()
	var made atomic.Int64
	c := dial(t, socket, hbm.Hello{NPUs: 1})
	_, err := c.OpenWeights(t.Context(), 0, set, writing(&made), nil)
	must(t, err)
	var before hbm.Stats
	for i := range 200 {
		must(t, c.Join(t.Context(), 1))
		w, err := c.OpenWeights(t.Context(), 1, some(set, i%3, 3+i%3, 6+i%3), never, nil)
		must(t, err)
		checkSome(t, w, 2)
		wantErr(t, c.Part(t.Context(), 1), mem.ErrInvalid)
		must(t, w.Close())
		must(t, c.Part(t.Context(), 1))
		switch s := d.Stats(); {
		case i == 2: // all nine have been there
			before = s
		case i > 2 && (s.Shared[1].Used != before.Shared[1].Used || s.Shared[1].Cached != before.Shared[1].Cached || s.Holds != before.Holds ||
			s.Copied != before.Copied || s.Shared[1].Peak != before.Shared[1].Peak):
			t.Fatalf("after %d times %+v; before %+v", i, s, before)
		}
	}
}

// BenchmarkCopyWeights attaches a set in one domain by copy from another, with and without a rate, and copies as many bytes between two
// slices of this process by one goroutine. With a rate, kept is the time that it leaves to the time that the attach took.
func BenchmarkCopyWeights(b *testing.B) {
	bytes := benchBytes(b)
	set := hbm.WeightSet{Key: hbm.Key{1}}
	objects := max(96, bytes>>20)
	for range objects {
		set.Sizes = append(set.Sizes, bytes/objects)
	}
	for _, rate := range []int64{0, 8e9, 4e9, 2e9, 1e9, 200e6, 50e6} {
		name := "rate=any"
		if rate > 0 {
			name = fmt.Sprintf("rate=%dMB/s", rate/1e6)
		}
		b.Run(name, func(b *testing.B) {
			_, socket := daemon(b, perNPU, func(c *hmm.Config) {
				c.Weights = 2*bytes + 64<<20
				c.Weights -= c.Weights % page
			})
			c := dial(b, socket, hbm.Hello{})
			empty := func(context.Context, []int, [][]byte) error { return nil }
			source, err := c.OpenWeights(b.Context(), 0, set, empty, nil)
			if err != nil {
				b.Fatal(err)
			}
			src, dst := make([]byte, bytes), make([]byte, bytes)
			for i := 0; i < len(src); i += 4096 {
				src[i], dst[i] = 1, 1
			}
			var plain, copied, attached time.Duration
			n := 0
			for b.Loop() {
				slow := set
				slow.Key[1] = byte(n) // another set of the same content each time: what rests would be attached
				if n++; n > 1 {
					if err := source.Close(); err != nil {
						b.Fatal(err)
					}
					if source, err = c.OpenWeights(b.Context(), 0, hbm.WeightSet{Key: slow.Key, Sizes: set.Sizes}, empty, nil); err != nil {
						b.Fatal(err)
					}
				}
				start := time.Now()
				slow.Pace = hbm.NewPacer(rate)
				w, err := c.OpenWeights(b.Context(), 1, slow, never, nil)
				if err != nil {
					b.Fatal(err)
				}
				attached += time.Since(start)
				copied += w.Copying
				if err := w.Close(); err != nil {
					b.Fatal(err)
				}
				began := time.Now()
				copy(dst, src)
				plain += time.Since(began)
			}
			b.ReportMetric(float64(int64(n)*bytes)/1e9/copied.Seconds(), "attach-GB/s")
			b.ReportMetric(float64(int64(n)*bytes)/1e9/plain.Seconds(), "memcpy-GB/s")
			if rate > 0 {
				b.ReportMetric(float64(int64(n)*bytes)/float64(rate)/attached.Seconds(), "kept")
			}
		})
	}
}
