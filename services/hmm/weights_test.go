package hmm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm"
)

// tenWeights is a set of ten objects of several sizes, made two or three at a time.
func tenWeights() hbm.WeightSet {
	set := hbm.WeightSet{Key: hbm.Key{7}, Part: 5 * page}
	for i := range int64(10) {
		set.Sizes = append(set.Sizes, page+i*page/4-i)
	}
	return set
}

// content is what the objects of a set hold.
func content(i int, n int64) []byte {
	b := make([]byte, n)
	for j := range b {
		b[j] = byte(i + 1 + j*7)
	}
	return b
}

// writing is a Filler of content that counts its objects.
func writing(n *atomic.Int64) hbm.Filler {
	return func(_ context.Context, numbers []int, objects [][]byte) error {
		for i, o := range objects {
			copy(o, content(numbers[i], int64(len(o))))
			n.Add(1)
		}
		return nil
	}
}

// never is a Filler for those who must find everything there.
func never(context.Context, []int, [][]byte) error { return errors.New("nothing was to be made") }

// loadHalf is the child that begins a set and stops in its second part, for ever.
func loadHalf(ctx context.Context, c *hbm.Client) error {
	stopped, failed := make(chan struct{}), make(chan error, 1)
	var n atomic.Int64
	go func() {
		_, err := c.OpenWeights(ctx, c.NPUs()[0], tenWeights(), func(ctx context.Context, numbers []int, objects [][]byte) error {
			if numbers[0] > 0 {
				objects[0][0] = 99 // half-written
				close(stopped)
				select {}
			}
			return writing(&n)(ctx, numbers, objects)
		}, nil)
		failed <- fmt.Errorf("the set was opened: %w", err)
	}()
	select {
	case <-stopped:
		return nil
	case err := <-failed:
		return err
	}
}

func checkWeights(t *testing.T, w *hbm.Weights, set hbm.WeightSet) {
	t.Helper()
	if len(w.Objects) != len(set.Sizes) {
		t.Fatalf("%d objects of %d", len(w.Objects), len(set.Sizes))
	}
	for i, o := range w.Objects {
		if !bytes.Equal(o, content(i, set.Sizes[i])) {
			t.Errorf("object %d has other content", i)
		}
		if h := w.Handles[i]; !h.Sealed || h.CRC != mem.Checksum(o) || h.Kind != mem.KindWeights || int(h.NPU) != mem.Shared(1) {
			t.Errorf("object %d is %+v", i, h)
		}
	}
}

// TestWeightsAreMadeOnce has many clients open a set at the same time: one makes it, all map the same extents, no NPU pays
// for it, and it stays when all are gone.
func TestWeightsAreMadeOnce(t *testing.T) {
	d, socket := daemon(t, func(c *hmm.Config) { c.Weights = 64 * page })
	set := tenWeights()
	var made atomic.Int64
	var mu sync.Mutex
	var extents [][]mem.Extent
	var wg sync.WaitGroup
	for i := range 6 {
		c := dial(t, socket, hbm.Hello{Instance: fmt.Sprint("i", i)})
		wg.Go(func() {
			w, err := c.OpenWeights(t.Context(), i%2, set, writing(&made), nil)
			if err != nil {
				t.Error(err)
				return
			}
			checkWeights(t, w, set)
			if err := w.Populate(t.Context()); err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			extents = append(extents, w.Extents)
		})
	}
	wg.Wait()
	if made.Load() != 10 || len(extents) != 6 {
		t.Fatalf("%d objects were made for %d clients", made.Load(), len(extents))
	}
	for _, e := range extents[1:] {
		if !slices.Equal(e, extents[0]) {
			t.Errorf("one client has %v, another %v", e, extents[0])
		}
	}
	s := d.Stats()
	if len(s.Weights) != 1 || s.Weights[0].Holders != 6 || s.Weights[0].Loaded != s.Weights[0].Bytes || s.Memory[1].Used != 0 {
		t.Errorf("stats are %+v", s)
	}
	var want int64
	for _, n := range set.Sizes {
		want += n
	}
	if n := s.Shared[0]; n.Used != want || n.Cached != 0 || n.Kinds["weights"].Used != want {
		t.Errorf("the domain's account is %+v, the set has %d bytes", n, want)
	}
}

// TestWeightsRest shows that a set outlives its users, until another one needs its room.
func TestWeightsRest(t *testing.T) {
	d, socket := daemon(t, func(c *hmm.Config) { c.Weights = 25 * page })
	set := tenWeights() // just fits
	c := dial(t, socket, hbm.Hello{Instance: "first"})
	var made atomic.Int64
	w, err := c.OpenWeights(t.Context(), 0, set, writing(&made), nil)
	must(t, err)
	must(t, w.Close())
	must(t, c.Close())
	if s := d.Stats(); s.Shared[0].Cached == 0 || s.Weights[0].Holders != 0 || s.Objects != 0 {
		t.Errorf("after the last user %+v", s)
	}
	c = dial(t, socket, hbm.Hello{Instance: "second"})
	w, err = c.OpenWeights(t.Context(), 0, set, never, nil)
	must(t, err)
	checkWeights(t, w, set)

	other := hbm.WeightSet{Key: hbm.Key{8}, Sizes: []int64{20 * page}}
	_, err = c.OpenWeights(t.Context(), 0, other, writing(&made), nil) // the first is in use
	wantErr(t, err, mem.ErrExhausted)
	must(t, w.Close())
	w, err = c.OpenWeights(t.Context(), 0, other, writing(&made), nil)
	must(t, err)
	if s := d.Stats(); len(s.Weights) != 2 || s.Weights[0].Objects != 3 || s.Weights[0].Holders != 0 { // there is room for the first ones yet
		t.Errorf("sets %+v", s.Weights)
	}
	must(t, w.Close())
	made.Store(0)
	first, err := c.OpenWeights(t.Context(), 0, set, writing(&made), nil)
	must(t, err)
	checkWeights(t, first, set)
	if made.Load() != 7 {
		t.Errorf("%d objects were made anew, 3 of 10 were there", made.Load())
	}
	must(t, first.Close())
	_, err = c.OpenWeights(t.Context(), 0, hbm.WeightSet{Key: hbm.Key{9}, Sizes: []int64{26 * page}}, never, nil)
	wantErr(t, err, mem.ErrExhausted)
}

// TestOtherWeightsNeverAttach shows that neither another key nor other sizes under the same key give anybody's memory.
func TestOtherWeightsNeverAttach(t *testing.T) {
	_, socket := daemon(t)
	c := dial(t, socket, hbm.Hello{})
	var made atomic.Int64
	set := tenWeights()
	first, err := c.OpenWeights(t.Context(), 0, set, writing(&made), nil)
	must(t, err)
	set.Key = hbm.Key{6}
	second, err := c.OpenWeights(t.Context(), 0, set, writing(&made), nil)
	must(t, err)
	if made.Load() != 20 || first.Extents[0] == second.Extents[0] {
		t.Errorf("%d objects were made, extents %v and %v", made.Load(), first.Extents[0], second.Extents[0])
	}
	swapped := tenWeights() // as many objects and bytes, in another order
	swapped.Sizes[3], swapped.Sizes[4] = swapped.Sizes[4], swapped.Sizes[3]
	_, err = c.OpenWeights(t.Context(), 0, swapped, never, nil)
	wantErr(t, err, mem.ErrInvalid)
	longer := tenWeights()
	longer.Sizes[9]++
	_, err = c.OpenWeights(t.Context(), 0, longer, never, nil)
	wantErr(t, err, mem.ErrInvalid)
}

// TestKilledLoader kills a process in the middle of loading, while others make what it has not begun: they make what it was at, and
// nothing of it is left but what it had made.
func TestKilledLoader(t *testing.T) {
	d, socket := daemon(t)
	set := tenWeights()
	loader, _ := start(t, "loader", socket)
	var made atomic.Int64
	var waiting atomic.Int64
	var wg sync.WaitGroup
	var mu sync.Mutex
	var filled []int
	for i := range 3 {
		c := dial(t, socket, hbm.Hello{Instance: fmt.Sprint("i", i)})
		wg.Go(func() {
			w, err := c.OpenWeights(t.Context(), 0, set, writing(&made), func(done, total int64) {
				if done > 0 && done < total {
					waiting.Add(1)
				}
			})
			if err != nil {
				t.Error(err)
				return
			}
			checkWeights(t, w, set)
			mu.Lock()
			defer mu.Unlock()
			filled = append(filled, w.Filled)
		})
	}
	eventually(t, "all wait and see how far it is", func() bool { return waiting.Load() >= 3 })
	kill(t, loader)
	wg.Wait()
	if len(filled) != 3 || filled[0]+filled[1]+filled[2] != 7 || made.Load() != 7 {
		t.Errorf("the others made %v of 10 objects, the loader had made 3", filled)
	}
	s := d.Stats()
	if len(s.Weights) != 1 || s.Shared[0].Used != s.Weights[0].Bytes {
		t.Errorf("stats are %+v", s)
	}
}

// TestSpoiledHalf kills a loader whose finished objects were damaged: its successor sees that and makes the damaged one anew.
func TestSpoiledHalf(t *testing.T) {
	_, socket := daemon(t)
	set := tenWeights()
	c := dial(t, socket, hbm.Hello{Instance: "maker"})
	failed := errors.New("the disk broke")
	var first []byte
	var made atomic.Int64
	_, err := c.OpenWeights(t.Context(), 0, set, func(ctx context.Context, numbers []int, objects [][]byte) error {
		if numbers[0] == 0 {
			first = objects[0]
			return writing(&made)(ctx, numbers, objects)
		}
		must(t, unix.Mprotect(first[:page], unix.PROT_READ|unix.PROT_WRITE)) // it is final and read-only by now
		first[5] ^= 1
		return failed
	}, nil)
	wantErr(t, err, failed)
	made.Store(0)
	other := dial(t, socket, hbm.Hello{Instance: "successor"})
	w, err := other.OpenWeights(t.Context(), 0, set, writing(&made), nil)
	must(t, err)
	checkWeights(t, w, set)
	if made.Load() != 8 {
		t.Errorf("%d objects were made, 7 were missing and one of 3 was wrong", made.Load())
	}
	third, err := dial(t, socket, hbm.Hello{Instance: "third"}).OpenWeights(t.Context(), 0, set, never, nil)
	must(t, err)
	checkWeights(t, third, set)
}

// TestWeightsBadInput shows that what makes no sense, or comes from one who does not hold the set, is refused.
func TestWeightsBadInput(t *testing.T) {
	_, socket := daemon(t)
	c := dial(t, socket, hbm.Hello{})
	for name, set := range map[string]hbm.WeightSet{
		"no objects": {Key: hbm.Key{1}}, "an empty object": {Key: hbm.Key{1}, Sizes: []int64{5, 0, 5}},
		"a negative one": {Key: hbm.Key{1}, Sizes: []int64{-1, 10}},
	} {
		if _, err := c.OpenWeights(t.Context(), 0, set, never, nil); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, npu := range []int{-2, -1, 2} {
		_, err := c.OpenWeights(t.Context(), npu, tenWeights(), never, nil)
		wantErr(t, err, mem.ErrInvalid)
	}
	_, err := dial(t, socket, hbm.Hello{Role: "gateway"}).OpenWeights(t.Context(), 0, tenWeights(), never, nil)
	wantErr(t, err, mem.ErrDenied)
}
