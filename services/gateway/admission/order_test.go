package admission

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"trireme.dev/shared/sched"
)

// crowd lets requests wait behind one that has all there is, and remembers in which order they were let in.
type crowd struct {
	t      *testing.T
	g      *Gate
	mu     sync.Mutex
	order  []string
	errors map[string]error
}

func newCrowd(t *testing.T, l Limits) (c *crowd, first *Credit) {
	if l.Requests == 0 {
		l.Requests = 1
	}
	if l.Queue == 0 {
		l.Queue = 10
	}
	if l.Wait == 0 {
		l.Wait = time.Hour
	}
	c = &crowd{t: t, g: New(l, time.Now), errors: map[string]error{}}
	first, err := c.g.Acquire(t.Context(), Request{N: 1, Arrived: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { time.Sleep(time.Minute) }) // for who was let in; nobody waits any more, as the context has ended
	return c, first
}

// comes lets a request come and, when it is let in, takes a second each. It belongs into a synctest bubble.
func (c *crowd) comes(name string, r Request) {
	r.N, r.Arrived = 1, time.Now()
	go func() {
		credit, err := c.g.Acquire(c.t.Context(), r)
		c.mu.Lock()
		if err != nil {
			c.errors[name] = err
			c.mu.Unlock()
			return
		}
		c.order = append(c.order, name)
		c.mu.Unlock()
		time.Sleep(time.Second)
		credit.Release()
	}()
	synctest.Wait()
}

func (c *crowd) want(order ...string) {
	c.t.Helper()
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Equal(c.order, order) {
		c.t.Errorf("let in were %v, want %v", c.order, order)
	}
}

func (c *crowd) refused(name string) *Refusal {
	c.t.Helper()
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	var r *Refusal
	if !errors.As(c.errors[name], &r) {
		c.t.Fatalf("%s was not refused: %v; let in: %v", name, c.errors[name], c.order)
	}
	return r
}

func in(d time.Duration) time.Time { return time.Now().Add(d) }

// Who waits is let in as the policy says, priorities first; one that goes before the one that waits for room, and fits, is
// let in at once.
func TestPolicies(t *testing.T) {
	for policy, want := range map[sched.Policy][]string{
		sched.FCFS: {"urgent", "long", "short", "tight"}, sched.SJF: {"urgent", "short", "tight", "long"}, sched.SLO: {"urgent", "tight", "long", "short"},
	} {
		t.Run(policy.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, first := newCrowd(t, Limits{Order: sched.Order{Policy: policy}})
				c.comes("long", Request{Tokens: 1000, Class: "x"})
				c.comes("short", Request{Tokens: 10, Class: "x"})
				c.comes("tight", Request{Tokens: 100, Class: "y", Due: in(time.Minute)})
				c.comes("urgent", Request{Tokens: 1000, Class: "y", Priority: -1})
				if w := c.g.Waiting(); w["x"] != 2 || w["y"] != 2 {
					t.Errorf("waiting by class: %v", w)
				}
				first.Release()
				time.Sleep(5 * time.Second)
				c.want(want...)
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		c, first := newCrowd(t, Limits{Requests: 10})
		c.g.SetCapacity(Capacity{KV: 100})
		first.Grow(Bytes{KV: 50})
		c.comes("large", Request{Bytes: Bytes{KV: 95}})
		c.comes("small", Request{Bytes: Bytes{KV: 10}})
		c.want()
		c.comes("small and urgent", Request{Bytes: Bytes{KV: 10}, Priority: -1})
		c.want("small and urgent")
		first.Release()
		time.Sleep(5 * time.Second)
		c.want("small and urgent", "large", "small")
	})
}

// A request that can no longer meet its targets goes last, or is refused at the moment from which on it cannot: when it comes
// already, if the line is too long.
func TestLate(t *testing.T) {
	for _, refuse := range []bool{false, true} {
		t.Run(fmt.Sprintf("refuse=%v", refuse), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, first := newCrowd(t, Limits{Order: sched.Order{Policy: sched.SLO}, RefuseLate: refuse})
				began := time.Now()
				c.comes("late", Request{Due: in(2 * time.Second)})
				c.comes("patient", Request{})
				c.comes("hopeless", Request{Due: in(-time.Second)})
				if refuse {
					if r := c.refused("hopeless"); r.Reason != Late {
						t.Errorf("hopeless: %v", r)
					}
				}
				time.Sleep(2*time.Second + 1)
				if refuse {
					if r := c.refused("late"); r.Reason != Late || time.Since(began) != 2*time.Second+1 {
						t.Errorf("after %v: %v", time.Since(began), r)
					}
				}
				first.Release()
				time.Sleep(20 * time.Second)
				if refuse {
					c.want("patient")
				} else {
					c.want("patient", "hopeless", "late")
				}
				for range 2 { // when the second six come, it is known how fast requests are let in: one a second
					time.Sleep(20 * time.Second)
					for i := range 6 {
						c.comes(fmt.Sprint(i), Request{})
					}
				}
				c.comes("in time", Request{Due: in(7 * time.Second)})
				c.comes("too late", Request{Due: in(6 * time.Second / 10)})
				if refuse {
					c.refused("too late")
				}
				time.Sleep(20 * time.Second)
				synctest.Wait()
				c.mu.Lock()
				defer c.mu.Unlock()
				if err := c.errors["in time"]; err != nil {
					t.Error(err)
				}
				if !refuse && c.order[len(c.order)-1] != "too late" {
					t.Errorf("let in were %v", c.order)
				}
			})
		})
	}
}

// What finds room at once is let in, whatever its targets: nobody gains by its refusal.
func TestLateWithRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := newCrowd(t, Limits{Requests: 2, Order: sched.Order{Policy: sched.SLO}, RefuseLate: true})
		c.comes("hopeless", Request{Due: in(-time.Hour)})
		c.want("hopeless")
	})
}

// A tenant that fills the line keeps nobody else out of it, and neither do requests that go last.
func TestFullQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, first := newCrowd(t, Limits{Queue: 4})
		for i := range 4 {
			c.comes(fmt.Sprint("greedy", i), Request{Tenant: "greedy", Tokens: 10})
		}
		c.comes("greedy4", Request{Tenant: "greedy", Tokens: 10})
		c.refused("greedy4")
		c.comes("other", Request{Tenant: "other", Tokens: 10})
		if r := c.refused("greedy3"); r.Reason != QueueFull || r.Waiting != 4 {
			t.Errorf("%+v", r)
		}
		c.comes("urgent", Request{Tenant: "other", Tokens: 10, Priority: -1})
		c.refused("greedy2")
		c.comes("unimportant", Request{Tenant: "a third", Tokens: 10, Priority: 1})
		c.refused("unimportant")
		first.Release()
		time.Sleep(5 * time.Second)
		c.want("urgent", "greedy0", "other", "greedy1")
	})
}

// Only so many are let in as there are places before the first token, and answers that have begun need none.
func TestAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(Limits{Requests: 100, Queue: 100, Wait: time.Hour}, time.Now)
		g.SetAhead(2)
		credits := make(chan *Credit, 10)
		acquire := func(n int) {
			go func() {
				c, err := g.Acquire(t.Context(), Request{N: n, Arrived: time.Now()})
				if err != nil {
					t.Error(err)
				}
				credits <- c
			}()
			synctest.Wait()
		}
		want := func(open, waiting int) {
			t.Helper()
			synctest.Wait()
			if o, w := g.Load(); o != open || w != waiting {
				t.Fatalf("%d open, %d waiting, want %d and %d", o, w, open, waiting)
			}
		}
		acquire(5) // more than there are places for, but the only one
		acquire(1)
		want(5, 1)
		many := <-credits
		parts := []*Credit{many.Split(2, 0, Bytes{}), many}
		parts[0].Started()
		parts[0].Started() // twice is once
		want(5, 1)
		parts[1].Started()
		want(6, 0)
		acquire(1)
		acquire(1)
		want(7, 1)
		done := make(chan error)
		go func() { done <- parts[0].Exchange(t.Context(), Bytes{}) }() // takes no place
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		want(7, 1)
		(<-credits).Release() // ends without a first token
		want(7, 0)
		g.SetAhead(0)
		acquire(1)
		want(8, 0)
	})
}

// Retry-After is honest: who obeys is let in at once, and who comes at half the time has to wait. Requests of many sizes come
// faster than they can be served, three at a time, until the line is full.
func TestRetryAfter(t *testing.T) {
	for _, policy := range []sched.Policy{sched.FCFS, sched.SJF, sched.SLO} {
		for _, share := range []time.Duration{2, 1} { // of the time that it was told: the half, all of it
			t.Run(fmt.Sprintf("%v/%d", policy, share), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					g := New(Limits{Requests: 3, Queue: 20, Wait: time.Hour, Order: sched.Order{Policy: policy}}, time.Now)
					ask := func(tokens int64) (time.Duration, error) {
						began := time.Now()
						c, err := g.Acquire(t.Context(), Request{N: 1, Tokens: tokens, Arrived: began})
						if err != nil {
							return 0, err
						}
						waited := time.Since(began)
						go func() {
							time.Sleep(time.Duration(tokens) * 100 * time.Millisecond)
							c.Release()
						}()
						return waited, nil
					}
					for i := range 60 {
						go func() { _, _ = ask(20 + int64(i*37%80)) }()
						time.Sleep(time.Second)
					}
					g.mu.Lock()
					for g.queue.Len() < 20 {
						g.mu.Unlock()
						go func() { _, _ = ask(60) }()
						synctest.Wait()
						g.mu.Lock()
					}
					g.mu.Unlock()
					_, err := ask(100) // goes last under each policy
					var r *Refusal
					if !errors.As(err, &r) {
						t.Fatal(err)
					}
					time.Sleep(r.RetryAfter / share)
					waited, err := ask(100)
					if err != nil {
						t.Fatal(err)
					}
					t.Logf("told %v, came after %v, waited %v", r.RetryAfter, r.RetryAfter/share, waited)
					time.Sleep(time.Hour)
					if share == 1 && waited > r.RetryAfter/10 || share == 2 && waited < r.RetryAfter/4 {
						t.Errorf("was told to come in %v, came after %v, and waited for %v", r.RetryAfter, r.RetryAfter/share, waited)
					}
				})
			})
		}
	}
}
