package admission

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"trireme.dev/shared/sched"
)

func TestCreditsAndOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(Limits{Requests: 10, Queue: 10, Wait: time.Minute}, time.Now)
		g.SetCapacity(Capacity{KV: 100})
		first, err := g.Acquire(t.Context(), Request{N: 1, Bytes: Bytes{KV: 80}})
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var order []int
		releases := make(chan *Credit, 3)
		for i, bytes := range []int64{50, 10, 500} { // the small one must not overtake, the huge one runs alone
			go func() {
				credit, err := g.Acquire(t.Context(), Request{N: 1, Bytes: Bytes{KV: bytes}})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				order = append(order, i)
				mu.Unlock()
				releases <- credit
			}()
			synctest.Wait()
		}
		if open, waiting := g.Load(); open != 1 || waiting != 3 {
			t.Fatalf("open %d, waiting %d", open, waiting)
		}
		first.Release()
		first.Release() // twice is once
		synctest.Wait()
		if open, waiting := g.Load(); open != 2 || waiting != 1 {
			t.Fatalf("open %d, waiting %d", open, waiting)
		}
		(<-releases).Release()
		(<-releases).Release()
		synctest.Wait()
		(<-releases).Release()
		if open, _ := g.Load(); open != 0 || order[2] != 2 {
			t.Fatalf("open %d, order %v", open, order)
		}
	})
}

func TestCreditsGrow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(Limits{Requests: 10, Queue: 10, Wait: time.Minute}, time.Now)
		g.SetCapacity(Capacity{KV: 100})
		first, err := g.Acquire(t.Context(), Request{N: 1, Bytes: Bytes{KV: 50}})
		if err != nil {
			t.Fatal(err)
		}
		first.Grow(Bytes{KV: 60})
		let := make(chan *Credit)
		go func() {
			credit, err := g.Acquire(t.Context(), Request{N: 1, Bytes: Bytes{KV: 50}})
			if err != nil {
				t.Error(err)
			}
			let <- credit
		}()
		synctest.Wait()
		if _, waiting := g.Load(); waiting != 1 {
			t.Fatal("let in although the first has grown over all there is")
		}
		first.Release()
		first.Grow(Bytes{KV: 1000}) // too late to count
		second := <-let
		second.Release()
		if g.used != (Bytes{}) {
			t.Errorf("%+v bytes left behind", g.used)
		}
	})
}

// One that exchanges its credit holds nothing while it waits, goes before all that have not begun, is never refused, and is
// let in with all that it asked for.
func TestExchange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(Limits{Requests: 10, Queue: 10, Wait: time.Hour}, time.Now)
		g.SetCapacity(Capacity{KV: 100})
		acquire := func(bytes int64) *Credit {
			c, err := g.Acquire(t.Context(), Request{N: 1, Bytes: Bytes{KV: bytes}, Arrived: time.Now()})
			if err != nil {
				t.Error(err)
			}
			return c
		}
		a, b := acquire(40), acquire(40)
		a.Grow(Bytes{KV: 20})
		early := make(chan *Credit, 1)
		go func() { early <- acquire(30) }() // was in line first, but has not begun
		synctest.Wait()
		exchanged := make(chan error, 1)
		go func() { exchanged <- b.Exchange(t.Context(), Bytes{KV: 90}) }()
		synctest.Wait()
		if open, waiting := g.Load(); open != 1 || waiting != 2 || g.used != (Bytes{KV: 60}) || g.Waiting()[ClassBegun] != 1 {
			t.Fatalf("open %d, waiting %d, %+v bytes; want one open, and the one that has begun before the early one", open, waiting, g.used)
		}
		time.Sleep(50 * time.Minute)
		late := make(chan *Credit, 1)
		go func() { late <- acquire(5) }() // fits, but must not overtake
		synctest.Wait()
		if _, waiting := g.Load(); waiting != 3 {
			t.Fatalf("%d waiting", waiting)
		}
		a.Release()
		if err := <-exchanged; err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if _, waiting := g.Load(); g.used != (Bytes{KV: 90}) || waiting != 2 {
			t.Errorf("%+v bytes in use, %d waiting", g.used, waiting)
		}
		b.Release()
		(<-early).Release()
		(<-late).Release()
		if open, _ := g.Load(); open != 0 || g.used != (Bytes{}) || g.ahead != 0 || len(g.Waiting()) != 0 {
			t.Errorf("%d open, %d ahead, %+v bytes at the end", open, g.ahead, g.used)
		}
	})
}

func TestExchangeGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(Limits{Requests: 10, Queue: 10, Wait: time.Minute}, time.Now)
		g.SetCapacity(Capacity{KV: 100})
		both, err := g.Acquire(t.Context(), Request{N: 2, Bytes: Bytes{KV: 100}})
		if err != nil {
			t.Fatal(err)
		}
		half := both.Split(1, 0, Bytes{KV: 30})
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := half.Exchange(ctx, Bytes{KV: 60}); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		half.Release() // holds nothing any more
		if open, waiting := g.Load(); open != 1 || waiting != 0 || g.used != (Bytes{KV: 70}) {
			t.Errorf("open %d, waiting %d, %+v bytes", open, waiting, g.used)
		}
		both.Release()
		if open, _ := g.Load(); open != 0 || g.used != (Bytes{}) {
			t.Errorf("%d open, %+v bytes at the end", open, g.used)
		}
	})
}

func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(Limits{Requests: 1, Queue: 1, Wait: 30 * time.Second}, time.Now)
		for range 20 { // credits come back every four seconds
			credit, err := g.Acquire(t.Context(), Request{N: 1, Bytes: Bytes{}})
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(4 * time.Second)
			credit.Release()
		}
		credit, err := g.Acquire(t.Context(), Request{N: 1, Bytes: Bytes{}})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		waited := make(chan error)
		go func() {
			_, err := g.Acquire(t.Context(), Request{N: 1, Bytes: Bytes{}})
			waited <- err
		}()
		synctest.Wait()
		var refusal *Refusal
		if _, err := g.Acquire(t.Context(), Request{N: 1, Bytes: Bytes{}}); !errors.As(err, &refusal) || refusal.RetryAfter != 8*time.Second ||
			refusal.Open != 1 || refusal.Waiting != 1 {
			t.Errorf("queue is full: %v", err)
		}
		if err := <-waited; !errors.Is(err, ErrFull) || time.Since(began) != 30*time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			_, err := g.Acquire(ctx, Request{N: 1, Bytes: Bytes{}})
			waited <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-waited; !errors.Is(err, context.Canceled) {
			t.Errorf("client gone: %v", err)
		}
		credit.Release()
		if open, waiting := g.Load(); open != 0 || waiting != 0 {
			t.Errorf("open %d, waiting %d", open, waiting)
		}
	})
}

// TestNeverOverCommits lets requests of any size, tenant, priority and target come, go and give up under any policy, and
// checks what is let in at each moment, that everybody gets an answer, and that nothing is left behind.
func TestNeverOverCommits(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		const requests = 4
		capacity := Capacity{ // 0: not known, or no bound
			KV: 100, MM: rapid.SampledFrom([]int64{0, 60}).Draw(rt, "MM"),
			Both: rapid.SampledFrom([]int64{0, 120}).Draw(rt, "both"), Prompt: rapid.SampledFrom([]int64{0, 80}).Draw(rt, "prompt"),
		}
		sizes := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Bytes {
			return Bytes{KV: rapid.Int64Range(0, 150).Draw(t, "KV"), MM: max(0, rapid.Int64Range(-50, 90).Draw(t, "MM"))}
		}), 1, 12).Draw(rt, "sizes")
		patience := rapid.SliceOfN(rapid.IntRange(1, 50), len(sizes), len(sizes)).Draw(rt, "patience")
		due := rapid.SliceOfN(rapid.IntRange(-2, 30), len(sizes), len(sizes)).Draw(rt, "due")
		limits := Limits{
			Requests: requests, Queue: rapid.IntRange(1, 12).Draw(rt, "queue"), Wait: time.Hour,
			Order:      sched.Order{Policy: sched.Policy(rapid.IntRange(0, 2).Draw(rt, "policy"))},
			RefuseLate: rapid.Bool().Draw(rt, "refuse late"),
		}
		places := rapid.IntRange(0, 3).Draw(rt, "places")
		synctest.Test(t, func(t *testing.T) {
			g := New(limits, time.Now)
			g.SetCapacity(capacity)
			g.SetAhead(places)
			var mu sync.Mutex
			var kv, mm int64
			open, ahead := 0, 0
			var wg sync.WaitGroup
			for i, bytes := range sizes {
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(patience[i])*time.Second)
					defer cancel()
					r := Request{N: 1, Bytes: bytes, Tenant: string('a' + rune(i%3)), Priority: i % 2, Tokens: bytes.KV, Arrived: time.Now()}
					if due[i] >= 0 {
						r.Due = time.Now().Add(time.Duration(due[i]) * time.Second)
					}
					credit, err := g.Acquire(ctx, r)
					if err != nil {
						if !errors.Is(err, ErrFull) && !errors.Is(err, context.DeadlineExceeded) {
							t.Error(err)
						}
						return
					}
					mu.Lock()
					kv, mm, open, ahead = kv+bytes.KV, mm+bytes.MM, open+1, ahead+1
					if places > 0 && ahead > places {
						t.Errorf("%d without their first token, %d places", ahead, places)
					}
					over := kv > capacity.KV || capacity.MM > 0 && mm > capacity.MM || capacity.Both > 0 && kv+mm > capacity.Both
					if open > requests || open > 1 && over {
						t.Errorf("%d open with %d and %d bytes", open, kv, mm)
					}
					mu.Unlock()
					time.Sleep(time.Duration(bytes.KV%4) * time.Second)
					mu.Lock()
					ahead--
					mu.Unlock()
					if i%4 > 0 { // some end without a first token
						credit.Started()
					}
					time.Sleep(time.Duration(bytes.KV%3) * time.Second)
					mu.Lock()
					kv, mm, open = kv-bytes.KV, mm-bytes.MM, open-1
					mu.Unlock()
					credit.Release()
				})
			}
			wg.Wait()
			if open, waiting := g.Load(); open != 0 || waiting != 0 || g.used != (Bytes{}) || g.ahead != 0 || len(g.classes) > 0 {
				t.Errorf("at the end %d open, %d waiting, %d ahead, %+v bytes", open, waiting, g.ahead, g.used)
			}
		})
	})
}

// Where the same NPUs have KV and pictures, both count together; where pictures lie beside the KV of prompts only, the one let
// in last finds room for its own, so that somebody always gets on.
func TestSharedNPUs(t *testing.T) {
	fill := Bytes{KV: 40, MM: 40} // what is let in first
	for name, x := range map[string]struct {
		capacity Capacity
		need     Bytes
		fits     bool
	}{
		"apart":                   {Capacity{KV: 100, MM: 100}, Bytes{KV: 60, MM: 60}, true},
		"together":                {Capacity{KV: 100, MM: 100, Both: 100}, Bytes{KV: 10, MM: 10}, true},
		"too much together":       {Capacity{KV: 100, MM: 100, Both: 100}, Bytes{KV: 11, MM: 10}, false},
		"a prompt beside":         {Capacity{KV: 100, MM: 100, Prompt: 100}, Bytes{KV: 50, MM: 10}, true},
		"no room for the prompt":  {Capacity{KV: 100, MM: 100, Prompt: 100}, Bytes{KV: 51, MM: 10}, false},
		"KV of others is no harm": {Capacity{KV: 200, MM: 100, Prompt: 100}, Bytes{KV: 60, MM: 0}, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			g := New(Limits{Requests: 9, Queue: 9, Wait: time.Second}, time.Now)
			g.SetCapacity(x.capacity)
			first, err := g.Acquire(t.Context(), Request{N: 1, Bytes: fill})
			if err != nil {
				t.Fatal(err)
			}
			second, err := g.Acquire(t.Context(), Request{N: 1, Bytes: x.need})
			if (err == nil) != x.fits {
				t.Errorf("%s: %v", name, err)
			}
			if err == nil {
				second.Release()
			}
			first.Release()
		})
	}
}
