package hmm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm"
)

func encodePart(request string) hbm.Part {
	return hbm.Part{Request: request, Attempt: 1, Stage: "encode"}
}

// makeMM makes, seals and publishes an MM object of one page.
func makeMM(t testing.TB, c *hbm.Client, ticket *hbm.Ticket, request string) {
	t.Helper()
	o := alloc(t, c, hbm.Spec{Kind: mem.KindMM, Bytes: page})
	fill(o[0], 5)
	_, err := c.Seal(t.Context(), ref(request, 1), o...)
	must(t, err)
	must(t, c.PublishMM(t.Context(), ticket, o[0]))
	free(t, c, o...)
}

// Fifty who want one MM object at once: one makes it, however often one who began gives up or dies.
func TestOneMakesAnMMObject(t *testing.T) {
	d, socket := daemon(t)
	clients := []*hbm.Client{dial(t, socket, hbm.Hello{Instance: "a"}), dial(t, socket, hbm.Hello{Instance: "b"})}
	key := hbm.Key{1}
	var begun, made atomic.Int64
	var wg sync.WaitGroup
	for i := range 50 {
		c, request := clients[i%2], fmt.Sprint("r", i)
		wg.Go(func() {
			k, err := c.Claim(t.Context(), encodePart(request), "")
			if err != nil {
				t.Error(err)
				return
			}
			h, ticket, err := c.FindMM(t.Context(), key, ref(request, 1), k, time.Minute)
			switch {
			case err != nil || h == nil && ticket == nil:
				t.Errorf("neither handle nor ticket: %v", err)
			case h != nil:
			case begun.Add(1) <= 3: // the first ones fail
				if err := c.AbandonMM(t.Context(), ticket); err != nil {
					t.Error(err)
				}
			default:
				made.Add(1)
				makeMM(t, c, ticket, request)
			}
		})
	}
	wg.Wait()
	if begun.Load() != 4 || made.Load() != 1 {
		t.Errorf("%d began, %d made it; want 4 and 1", begun.Load(), made.Load())
	}
	for i := range 50 {
		must(t, d.End(fmt.Sprint("r", i)))
	}
	if s := d.Stats(); s.Objects != 1 || s.Resting != 1 || s.CachedMM != 1 || s.Claims != 0 {
		t.Errorf("in the end %+v", s)
	}
}

func TestDeathOfTheOneWhoMakes(t *testing.T) {
	_, socket := daemon(t)
	a, b := dial(t, socket, hbm.Hello{Instance: "a"}), dial(t, socket, hbm.Hello{Instance: "b"})
	key := hbm.Key{1}
	first, ticket, err := a.FindMM(t.Context(), key, ref("r1", 1), claim(t, a, encodePart("r1"), ""), time.Minute)
	if err != nil || first != nil || ticket == nil {
		t.Fatalf("the first finds %v, %v, %v", first, ticket, err)
	}
	got := make(chan *hbm.Ticket, 1)
	waiter := claim(t, b, encodePart("r2"), "")
	asked := make(chan struct{})
	go func() {
		close(asked)
		_, ticket, err := b.FindMM(t.Context(), key, ref("r2", 1), waiter, time.Minute)
		if err != nil {
			t.Error(err)
		}
		got <- ticket
	}()
	<-asked
	must(t, a.Close())
	second := <-got
	if second == nil {
		t.Fatal("who waited did not begin after the death of the first")
	}
	makeMM(t, b, second, "r2")
	h, _, err := b.FindMM(t.Context(), key, ref("r3", 1), waiter, 0)
	if err != nil || h == nil {
		t.Fatalf("found %v, %v after it was made", h, err)
	}
	o := attach(t, b, mem.ReadOnly, 0, *h)
	must(t, o[0].Verify())
	free(t, b, o...)
}

// A wait ends with its time or its client.
func TestWaitEnds(t *testing.T) {
	_, socket := daemon(t)
	a := dial(t, socket, hbm.Hello{Instance: "a"})
	key := hbm.Key{1}
	_, first, err := a.FindMM(t.Context(), key, ref("r1", 1), claim(t, a, encodePart("r1"), ""), time.Minute)
	must(t, err)
	k := claim(t, a, encodePart("r2"), "")
	h, ticket, err := a.FindMM(t.Context(), key, ref("r2", 1), k, time.Millisecond)
	if err != nil || h != nil || ticket != nil {
		t.Errorf("a wait that was too long ended with %v, %v, %v", h, ticket, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := a.FindMM(ctx, key, ref("r2", 1), k, time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled wait ended with %v", err)
	}
	// The claim under which it is made goes to another: so does the right to make it.
	b := dial(t, socket, hbm.Hello{Instance: "b"})
	_, second, err := b.FindMM(t.Context(), key, ref("r1", 1), claim(t, b, encodePart("r1"), ""), time.Minute)
	if err != nil || second == nil {
		t.Errorf("the successor finds %v, %v; want a ticket", second, err)
	}
	o := alloc(t, a, hbm.Spec{Kind: mem.KindMM, Bytes: page})
	_, err = a.Seal(t.Context(), ref("r2", 1), o...)
	must(t, err)
	wantErr(t, a.PublishMM(t.Context(), first, o[0]), mem.ErrFenced)
	must(t, a.Close()) // while a question of its own still waits
}

func TestPrefixIndex(t *testing.T) {
	d, socket := daemon(t, func(c *hmm.Config) { c.KVCache = 3 * page })
	a, b := dial(t, socket, hbm.Hello{Instance: "a"}), dial(t, socket, hbm.Hello{Instance: "b"})
	slabs := alloc(t, a, kv(0, page), kv(0, page))
	fill(slabs[0], 1)
	fill(slabs[1], 2)
	keys := []hbm.Key{{1}, {2}, {3}}
	blocks := []hbm.Block{{Slab: 0, Block: 0, CRC: 10}, {Slab: 0, Block: 3, CRC: 11}, {Slab: 1, Block: 0, CRC: 12}}
	must(t, a.CacheBlocks(t.Context(), slabs, blocks, keys))
	want := bytes.Clone(slabs[1].Bytes())
	free(t, a, slabs...)

	got, at, err := b.FindPrefix(t.Context(), 1, append(keys, hbm.Key{4}))
	must(t, err)
	if len(got) != 2 || fmt.Sprint(at) != fmt.Sprint(blocks) || !bytes.Equal(got[1].Bytes(), want) {
		t.Errorf("found %v in %d slabs, want %v", at, len(got), blocks)
	}
	none, at, err := b.FindPrefix(t.Context(), 1, []hbm.Key{{4}, {1}})
	if err != nil || len(none) != 0 || len(at) != 0 {
		t.Errorf("found %v behind a block that is not there, %v", at, err)
	}
	must(t, b.Forget(t.Context(), got[0]))
	free(t, b, got...)
	if s := d.Stats(); s.Objects != 1 || s.Resting != 1 || s.CachedBlocks != 1 {
		t.Errorf("after one slab was forgotten %+v", s)
	}
	// More than the cache may keep.
	for i := range 5 {
		o := alloc(t, a, kv(0, page))
		must(t, a.CacheBlocks(t.Context(), o, []hbm.Block{{}}, []hbm.Key{{9, byte(i)}}))
		free(t, a, o...)
	}
	if s := d.Stats(); s.Objects != 3 || s.Resting != 3 || s.Memory[1].Cached != 3*page {
		t.Errorf("a cache of three pages keeps %+v", s)
	}
}
