// Package vpagetest measures what it costs one NPU to get other experts, in each of the forms in which kernels may find them: a table
// of pointers, ranges of an even and an odd epoch (vpage), and one range that is changed in place.
package vpagetest

import (
	"math/rand/v2"
	"testing"
	"time"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/vpage"
	"trireme.dev/shared/sched/placement"
)

// Device is what a measurement needs of a backend.
type Device struct {
	Page int64
	// Open returns a space and a function that gives memory to an extent of it, ready for Space.Map, and one that takes it back.
	Open func(b *testing.B, bytes int64) (space mem.Space, back, drop func(mem.Extent) error)
	// Overhead is what the system holds for mappings besides the memory that is mapped, in bytes.
	Overhead func() (int64, error)
}

// Shape is the experts of a model.
type Shape struct {
	Name            string
	Layers, Experts int
	Bytes           int64 // of one expert
}

// Qwen3 are the experts of Qwen3-30B-A3B in bf16: 3 matrices of 768 x 2048 each (its config.json).
var Qwen3 = Shape{"qwen3-30b", 48, 128, 3 * 768 * 2048 * 2}

// Bench takes NPU 0 of an instance from 3 NPUs to 4 and back, again and again, under a load that shifts in between, and reports of
// each form, for a change: the maps and unmaps that it asks for besides those of experts that come and go; how long it prepares
// beside serving, stops it, and cleans up behind; and what the second ranges cost in memory.
func Bench(b *testing.B, d Device, shape Shape) {
	stride := mem.Padded(shape.Bytes, d.Page)
	layouts := layouts(b, shape)
	for _, form := range []string{"table", "vpage", "inplace"} {
		b.Run(shape.Name+"/"+form, func(b *testing.B) {
			places := 0
			for l := range shape.Layers {
				for _, at := range layouts {
					places = max(places, len(at.On(l, 0)))
				}
			}
			n := &npu{b: b, shape: shape, stride: stride, room: int64(shape.Layers * (places + 1) * 2)}
			n.space, n.back, n.drop = d.Open(b, n.room*stride)
			before := n.overhead(d)
			ranges, err := vpage.New(n.space.Window, shape.Layers, places, stride)
			if err != nil {
				b.Fatal(err)
			}
			defer ranges.Close()
			n.arrive(layouts[0])
			n.install(ranges, form)
			n.came = 0
			var prepare, pause, release time.Duration
			mapped, most, calls, changes := n.overhead(d), int64(0), ranges.Calls(), 0
			for b.Loop() {
				for i := range layouts {
					n.arrive(layouts[(i+1)%len(layouts)])
					p, s, r := n.change(ranges, form, func() { most = max(most, n.overhead(d)) })
					prepare, pause, release = prepare+p, pause+s, release+r
					n.leave()
					changes++
				}
			}
			now := ranges.Calls()
			per := func(total float64, unit string) { b.ReportMetric(total/float64(changes), unit) }
			per(float64(now.Maps-calls.Maps), "maps")
			per(float64(now.Unmaps-calls.Unmaps), "unmaps")
			per(float64(n.came), "experts-in")
			per(prepare.Seconds()*1e3, "prepare-ms")
			per(pause.Seconds()*1e6, "pause-us")
			per(release.Seconds()*1e3, "release-ms")
			b.ReportMetric(float64(mapped-before)/(1<<20), "held-MiB")
			b.ReportMetric(float64(max(most-mapped, 0))/(1<<20), "peak-MiB")
			b.ReportMetric(100*float64(stride-shape.Bytes)/float64(shape.Bytes), "padding-%")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// layouts is a placement on 3 NPUs, then one on 4, each for another load.
func layouts(b *testing.B, s Shape) []placement.Layout {
	b.Helper()
	counts := make([]int, s.Layers)
	for l := range counts {
		counts[l] = s.Experts
	}
	r := rand.New(rand.NewPCG(1, 2))
	at := placement.Even(counts, placement.First(3))
	var all []placement.Layout
	for _, npus := range []int{4, 3} {
		load := make(placement.Load, s.Layers)
		for l := range load {
			load[l] = make([]uint64, s.Experts)
			for e := range load[l] {
				load[l][e] = 100 + r.Uint64N(100)
			}
		}
		slots := (s.Experts+npus-1)/npus + 1
		c, err := placement.Plan(at, load, placement.First(npus), placement.Options{Slots: slots, Slack: 0.05})
		if err != nil {
			b.Fatal(err)
		}
		at = c.Layout
		all = append(all, at)
	}
	return all
}

// npu is an NPU with the memory of its experts.
type npu struct {
	b      *testing.B
	shape  Shape
	stride int64
	space  mem.Space
	back   func(mem.Extent) error
	drop   func(mem.Extent) error

	room int64 // places in the space
	next int64 // the first that may be free
	used map[int64]bool
	has  []map[int]mem.Extent // [layer][expert]
	want placement.Layout
	came int // experts

	table [][]uintptr // of pointers, [layer][place]
}

// arrive makes room for the experts of a layout that are not here yet; what is copied into them is not our business.
func (n *npu) arrive(to placement.Layout) {
	if n.has == nil {
		n.has, n.used = make([]map[int]mem.Extent, n.shape.Layers), map[int64]bool{}
		for l := range n.has {
			n.has[l] = map[int]mem.Extent{}
		}
	}
	n.want = to
	for l := range n.has {
		for _, e := range to.On(l, 0) {
			if _, ok := n.has[l][e]; ok {
				continue
			}
			for n.used[n.next%n.room] {
				n.next++
			}
			x := mem.Extent{Offset: n.next % n.room * n.stride, Bytes: n.stride}
			n.used[n.next%n.room] = true
			n.must(n.back(x))
			_, err := n.space.Map(x, mem.ReadWrite)
			n.must(err)
			n.has[l][e] = x
			n.came++
		}
	}
}

// leave frees those that the layout does not have here.
func (n *npu) leave() {
	for l := range n.has {
		for e, x := range n.has[l] {
			if !n.want[l][e].Has(0) {
				n.must(n.space.Unmap(x))
				n.must(n.drop(x))
				delete(n.has[l], e)
				delete(n.used, x.Offset/n.stride)
			}
		}
	}
}

// extents are those of the wanted experts, in order.
func (n *npu) extents() [][]mem.Extent {
	all := make([][]mem.Extent, len(n.has))
	for l := range n.has {
		for _, e := range n.want.On(l, 0) {
			all[l] = append(all[l], n.has[l][e])
		}
	}
	return all
}

// pointers are the addresses of the wanted experts, as a table for kernels.
func (n *npu) pointers(extents [][]mem.Extent) [][]uintptr {
	all := make([][]uintptr, len(extents))
	for l, es := range extents {
		all[l] = make([]uintptr, len(es))
		for i, e := range es {
			all[l][i] = uintptr(e.Offset)
		}
	}
	return all
}

func (n *npu) install(r *vpage.Ranges, form string) {
	if form == "table" {
		n.table = n.pointers(n.extents())
		return
	}
	n.must(r.Prepare(n.extents()))
	r.Commit()
}

// change goes over to the wanted experts, and says how long it took beside serving, in which time no step may run, and behind.
func (n *npu) change(r *vpage.Ranges, form string, prepared func()) (prepare, pause, release time.Duration) {
	extents := n.extents()
	took := func(f func()) time.Duration {
		start := time.Now()
		f()
		return time.Since(start)
	}
	switch form {
	case "table":
		var next [][]uintptr
		prepare = took(func() { next = n.pointers(extents) })
		prepared()
		pause = took(func() { n.table = next })
	case "vpage":
		prepare = took(func() { n.must(r.Prepare(extents)) })
		prepared()
		pause = took(r.Commit)
		release = took(func() { n.must(r.Release()) })
	case "inplace":
		pause = took(func() { n.must(r.InPlace(extents)) })
		prepared()
	}
	return prepare, pause, release
}

func (n *npu) overhead(d Device) int64 {
	bytes, err := d.Overhead()
	n.must(err)
	return bytes
}

func (n *npu) must(err error) {
	if err != nil {
		n.b.Helper()
		n.b.Fatal(err)
	}
}
