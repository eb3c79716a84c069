package cpu

import (
	"sync"
	"sync/atomic"
)

// task is work in independent pieces. run does piece i on a worker's thread; pieces write disjoint memory.
type task interface {
	run(worker, i int)
}

// pool runs tasks on a fixed set of goroutines, the caller's among them. Idle workers sleep on a channel; they never
// spin, because the stages of a pipeline share few cores. A task allocates nothing.
//
// Pieces are claimed by compare-and-set on one word. A worker that wakes late finds no piece left and sleeps again;
// the caller waits for claimed pieces only, never for a worker to wake.
type pool struct {
	claims  atomic.Uint64 // pieces of the task << 32 | the next piece to claim
	pending atomic.Int64  // pieces not yet done
	task    task          // may be read only by who holds a claimed, unfinished piece, and by the caller
	done    chan struct{} // holds a token when a worker finished the last piece
	wake    []chan struct{}
	exited  sync.WaitGroup
	once    sync.Once

	smallest int // floating-point operations in a piece, at least
}

// smallestPiece takes about ten microseconds. Less than four of them are not worth waking a thread for.
const (
	smallestPiece = 1 << 20
	leastPieces   = 4
)

func newPool(threads int) *pool {
	p := &pool{
		done: make(chan struct{}, 1), wake: make([]chan struct{}, threads-1),
		smallest: smallestPiece,
	}
	for i := range p.wake {
		p.wake[i] = make(chan struct{}, 1)
		p.exited.Go(func() {
			for range p.wake[i] {
				if p.work(i + 1) {
					p.done <- struct{}{}
				}
			}
		})
	}
	return p
}

// alone runs pieces 0 to n-1 of t on the caller's thread.
func (p *pool) alone(t task, n int) {
	for i := range n {
		t.run(0, i)
	}
}

// do runs pieces 0 to n-1 of t and returns when all are done.
func (p *pool) do(t task, n int) {
	if n <= 1 || len(p.wake) == 0 {
		p.alone(t, n)
		return
	}
	p.task = t
	p.pending.Store(int64(n))
	p.claims.Store(uint64(n) << 32)
	for _, wake := range p.wake[:min(n-1, len(p.wake))] {
		select {
		case wake <- struct{}{}:
		default: // it has not woken for an earlier task yet
		}
	}
	if !p.work(0) {
		<-p.done
	}
	p.task = nil
}

// work claims and runs pieces until none is left, and says whether it finished the last one.
func (p *pool) work(worker int) (last bool) {
	for {
		word := p.claims.Load()
		next, n := uint32(word), uint32(word>>32)
		if next >= n {
			return last
		}
		if !p.claims.CompareAndSwap(word, word+1) {
			continue
		}
		p.task.run(worker, int(next))
		last = p.pending.Add(-1) == 0
	}
}

// close ends the workers and waits for them.
func (p *pool) close() {
	p.once.Do(func() {
		for _, wake := range p.wake {
			close(wake)
		}
	})
	p.exited.Wait()
}

// pieces says into how many pieces to cut work of the given number of floating-point operations, at most limit.
func (p *pool) pieces(flops, limit int) int {
	threads := len(p.wake) + 1
	if threads == 1 || flops < leastPieces*p.smallest {
		return 1
	}
	return max(1, min(flops/p.smallest, 16*threads, limit))
}
