package page_test

import (
	"errors"
	"testing"

	"pgregory.net/rapid"

	"trireme.dev/shared/mem/page"
)

// model is the oracle: one owner a page.
type model []int

// bestFit is the specification of Alloc, by looking at every page.
func (m model) bestFit(n int) (start int, ok bool) {
	best, bestLen := -1, 0
	for i := 0; i < len(m); {
		if m[i] != 0 {
			i++
			continue
		}
		j := i
		for j < len(m) && m[j] == 0 {
			j++
		}
		if j-i >= n && (best < 0 || j-i < bestLen) {
			best, bestLen = i, j-i
		}
		i = j
	}
	return best, best >= 0
}

func (m model) free() (pages, ranges int) {
	for i, o := range m {
		if o == 0 {
			pages++
			if i == 0 || m[i-1] != 0 {
				ranges++
			}
		}
	}
	return pages, ranges
}

func TestAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := make(model, rapid.IntRange(1, 80).Draw(t, "total"))
		a := page.New(int64(len(m)))
		type held struct{ start, pages int }
		var live []held
		next := 0
		t.Repeat(map[string]func(*rapid.T){
			"alloc": func(t *rapid.T) {
				n := rapid.IntRange(1, 20).Draw(t, "pages")
				want, ok := m.bestFit(n)
				got, err := a.Alloc(int64(n))
				if ok != (err == nil) || !ok && !errors.Is(err, page.ErrNoRoom) {
					t.Fatalf("Alloc(%d) = %v, model says fits: %v", n, err, ok)
				}
				if !ok {
					return
				}
				if got != int64(want) {
					t.Fatalf("Alloc(%d) at %d, model says %d", n, got, want)
				}
				next++
				for i := want; i < want+n; i++ {
					m[i] = next
				}
				live = append(live, held{want, n})
			},
			"release": func(t *rapid.T) {
				if len(live) == 0 {
					t.Skip("nothing allocated")
				}
				i := rapid.IntRange(0, len(live)-1).Draw(t, "which")
				h := live[i]
				live = append(live[:i], live[i+1:]...)
				a.Release(int64(h.start))
				for j := h.start; j < h.start+h.pages; j++ {
					m[j] = 0
				}
			},
			"": func(t *rapid.T) {
				pages, ranges := m.free()
				if a.Free() != int64(pages) || a.Ranges() != ranges {
					t.Fatalf("free %d ranges %d, model: free %d of %d, ranges %d",
						a.Free(), a.Ranges(), pages, len(m), ranges)
				}
			},
		})
		for _, h := range live {
			a.Release(int64(h.start))
		}
		if a.Free() != int64(len(m)) || a.Ranges() != 1 {
			t.Fatalf("after releasing all: free %d of %d in %d ranges", a.Free(), len(m), a.Ranges())
		}
	})
}

func TestReleaseOfNothingPanics(t *testing.T) {
	a := page.New(8)
	if _, err := a.Alloc(4); err != nil {
		t.Fatal(err)
	}
	for _, start := range []int64{1, 4, -1} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("Release(%d) did not panic", start)
				}
			}()
			a.Release(start)
		}()
	}
}

func TestEmpty(t *testing.T) {
	if _, err := page.New(0).Alloc(1); !errors.Is(err, page.ErrNoRoom) {
		t.Fatalf("Alloc from nothing: %v", err)
	}
}

func BenchmarkAllocRelease(b *testing.B) {
	a := page.New(1 << 20)
	var starts []int64
	for i := range 10_000 { // a fragmented range: every second extent is freed again
		s, err := a.Alloc(int64(1 + i%7))
		if err != nil {
			b.Fatal(err)
		}
		starts = append(starts, s)
	}
	for i := 0; i < len(starts); i += 2 {
		a.Release(starts[i])
	}
	for b.Loop() {
		s, err := a.Alloc(8)
		if err != nil {
			b.Fatal(err)
		}
		a.Release(s)
	}
}
