package bus_test

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

func join(request string, parts int) *wire.Join {
	return &wire.Join{
		Prefill: wire.Prefill{Request: wire.Request{ID: request, Attempt: 1}, MM: make([]mem.Handle, parts)},
		Have:    make([]bool, parts),
	}
}

func TestMarkJoinConcurrently(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	buses := []*bus.Bus{connect(t, url), connect(t, url)}
	const parts = 10
	key := wire.JoinKey("r", 1)
	if err := buses[0].CreateJoin(t.Context(), key, join("r", parts)); err != nil {
		t.Fatal(err)
	}
	var complete atomic.Int32
	var marked [parts]atomic.Bool // MarkJoin of the part has returned
	var wg sync.WaitGroup
	for part := range parts {
		wg.Go(func() {
			var before [parts]bool
			for i := range marked {
				before[i] = marked[i].Load()
			}
			j, err := buses[part%2].MarkJoin(t.Context(), key, part, mem.Handle{Object: uint64(part + 1)}, false)
			if err != nil {
				t.Error(err)
				return
			}
			marked[part].Store(true)
			before[part] = true
			for i, want := range before {
				if want && (!j.Have[i] || j.Prefill.MM[i].Object != uint64(i+1)) {
					t.Errorf("the record that marking %d returned lacks %d", part, i)
				}
			}
			if j.Complete() {
				complete.Add(1)
			}
		})
	}
	wg.Wait()
	if complete.Load() != 1 {
		t.Errorf("%d callers saw the record complete, want the last writer alone", complete.Load())
	}
	// A redelivered shard marks again, sees the record complete and may replace the handle.
	for _, object := range []uint64{4, 99} {
		j, err := buses[1].MarkJoin(t.Context(), key, 3, mem.Handle{Object: object}, false)
		if err != nil || !j.Complete() || j.Prefill.MM[3].Object != object || j.Prefill.MM[4].Object != 5 {
			t.Errorf("marking again: %+v, %v", j, err)
		}
	}
}

func TestJoinRecord(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	key := wire.JoinKey("r", 1)
	if _, err := b.MarkJoin(t.Context(), key, 0, mem.Handle{}, false); !errors.Is(err, bus.ErrNoJoin) {
		t.Errorf("marking a record that never was: %v", err)
	}
	for range 2 { // the same record again is no error
		if err := b.CreateJoin(t.Context(), key, join("r", 2)); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.CreateJoin(t.Context(), key, join("r", 3)); !errors.Is(err, bus.ErrJoinExists) {
		t.Errorf("another record: %v", err)
	}
	for _, part := range []int{-1, 2} {
		if _, err := b.MarkJoin(t.Context(), key, part, mem.Handle{}, false); !errors.Is(err, wire.ErrMalformed) {
			t.Errorf("part %d of 2: %v", part, err)
		}
	}
	if j, err := b.MarkJoin(t.Context(), key, 1, mem.Handle{Object: 5}, true); err != nil || j.Complete() || j.Prefill.Hits != 1 || j.Prefill.Request.ID != "r" {
		t.Errorf("first of two marks: %+v, %v", j, err)
	}
	for range 2 { // deleting twice is no error
		if err := b.DeleteJoin(t.Context(), key); err != nil {
			t.Error(err)
		}
	}
	if _, err := b.MarkJoin(t.Context(), key, 0, mem.Handle{}, false); !errors.Is(err, bus.ErrNoJoin) {
		t.Errorf("marking a deleted record: %v", err)
	}
}
