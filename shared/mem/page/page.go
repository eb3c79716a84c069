// Package page places extents in a range of pages: a pure allocator, best fit, lowest address first among equals, freed
// ranges merged with their neighbours at once. It counts pages and holds no memory; whoever wants bytes multiplies.
package page

import (
	"errors"
	"fmt"
	"slices"
)

// ErrNoRoom is returned by Alloc when no free range is long enough; the error that wraps it names the longest.
var ErrNoRoom = errors.New("no free range is long enough")

// Allocator hands out ranges of pages. It is not safe for concurrent use.
type Allocator struct {
	total int64
	free  []span          // by start, no two touching
	used  map[int64]int64 // start of each allocated range -> pages
	inUse int64
}

type span struct{ start, pages int64 }

// New returns an allocator of pages 0 to total-1, all free.
func New(total int64) *Allocator {
	a := &Allocator{total: total, used: map[int64]int64{}}
	if total > 0 {
		a.free = []span{{0, total}}
	}
	return a
}

// Alloc takes n pages (n > 0) and returns the first: of the shortest free range that fits, and among equals of the one
// with the lowest address. A long free tail, best kept for the large, is thus used last.
func (a *Allocator) Alloc(n int64) (int64, error) {
	if n <= 0 {
		panic(fmt.Sprintf("BUG: page.Alloc of %d pages", n))
	}
	best := -1
	var longest int64
	for i, s := range a.free {
		longest = max(longest, s.pages)
		if s.pages >= n && (best < 0 || s.pages < a.free[best].pages) {
			best = i
			if s.pages == n {
				break
			}
		}
	}
	if best < 0 {
		return 0, fmt.Errorf("%d pages wanted, %d free in %d ranges, the longest %d: %w",
			n, a.Free(), len(a.free), longest, ErrNoRoom)
	}
	start := a.free[best].start
	if a.free[best].pages == n {
		a.free = slices.Delete(a.free, best, best+1)
	} else {
		a.free[best].start += n
		a.free[best].pages -= n
	}
	a.used[start] = n
	a.inUse += n
	return start, nil
}

// Release gives back the range that Alloc returned as start. It panics when there is none: the caller's books are wrong
// and memory in use would be handed out.
func (a *Allocator) Release(start int64) {
	n, ok := a.used[start]
	if !ok {
		panic(fmt.Sprintf("BUG: page.Release of page %d, where no range starts", start))
	}
	delete(a.used, start)
	a.inUse -= n
	i, _ := slices.BinarySearchFunc(a.free, start, func(s span, t int64) int {
		switch {
		case s.start < t:
			return -1
		case s.start > t:
			return 1
		}
		return 0
	})
	joinsLeft := i > 0 && a.free[i-1].start+a.free[i-1].pages == start
	joinsRight := i < len(a.free) && start+n == a.free[i].start
	switch {
	case joinsLeft && joinsRight:
		a.free[i-1].pages += n + a.free[i].pages
		a.free = slices.Delete(a.free, i, i+1)
	case joinsLeft:
		a.free[i-1].pages += n
	case joinsRight:
		a.free[i].start = start
		a.free[i].pages += n
	default:
		a.free = slices.Insert(a.free, i, span{start, n})
	}
}

// Free is the number of pages that are not allocated, in one range or many.
func (a *Allocator) Free() int64 { return a.total - a.inUse }

// Ranges is the number of free ranges: 1 when nothing is fragmented, 0 when all is used.
func (a *Allocator) Ranges() int { return len(a.free) }
