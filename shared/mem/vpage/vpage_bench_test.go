package vpage_test

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"trireme.dev/shared/kernel/cpu"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/memtest"
	"trireme.dev/shared/mem/vpage"
	"trireme.dev/shared/mem/vpage/vpagetest"
	"trireme.dev/shared/model"
)

// BenchmarkChange is what other experts cost one host NPU; experts of a fiftieth of the size of the model's, and of a ninth in a few
// of the layers.
func BenchmarkChange(b *testing.B) {
	for _, s := range []struct {
		layers int
		bytes  int64
	}{{vpagetest.Qwen3.Layers, 3 * page}, {8, 16 * page}} {
		shape := vpagetest.Qwen3
		shape.Layers, shape.Bytes = s.layers, s.bytes
		shape.Name = fmt.Sprintf("%s-layers=%d-KiB=%d", shape.Name, s.layers, s.bytes>>10)
		vpagetest.Bench(b, vpagetest.Device{
			Page: page,
			Open: func(b *testing.B, bytes int64) (mem.Space, func(mem.Extent) error, func(mem.Extent) error) {
				store, space := memtest.Host(b, bytes)
				return space, store.Back, store.Drop
			},
			Overhead: pageTables,
		}, shape)
	}
}

// pageTables is the memory of this process's page tables.
func pageTables() (int64, error) {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if v, ok := strings.CutPrefix(lines.Text(), "VmPTE:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("no VmPTE in /proc/self/status: %w", lines.Err())
}

// BenchmarkExperts is a layer's experts through pointers to their extents and through a range, in turns: what the form costs a step.
func BenchmarkExperts(b *testing.B) {
	const n, hidden, inner, topK = 32, 512, 192, 8
	c, err := cpu.New(cpu.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	stride := mem.Padded(3*hidden*inner*2, page)
	store, space := memtest.Host(b, n*stride)
	ranges, err := vpage.New(space.Window, 1, n, stride)
	if err != nil {
		b.Fatal(err)
	}
	defer ranges.Close()
	var extents []mem.Extent
	expert := func(p []byte) model.Expert {
		all := unsafe.Slice((*model.BF16)(unsafe.Pointer(unsafe.SliceData(p))), 3*hidden*inner)
		return model.Expert{
			Gate: model.Matrix{Data: all[:hidden*inner], Rows: inner, Cols: hidden},
			Up:   model.Matrix{Data: all[hidden*inner : 2*hidden*inner], Rows: inner, Cols: hidden},
			Down: model.Matrix{Data: all[2*hidden*inner:], Rows: hidden, Cols: inner},
		}
	}
	var table, ranged []model.Expert
	for i := range n {
		e := mem.Extent{Offset: int64((i*7)%n) * stride, Bytes: stride} // scattered, as after many changes
		if err := store.Back(e); err != nil {
			b.Fatal(err)
		}
		if _, err := space.Map(e, mem.ReadWrite); err != nil {
			b.Fatal(err)
		}
		x := expert(space.Bytes(e))
		for j := range x.Gate.Data {
			x.Gate.Data[j] = model.BF16(0x3c00 + (i+j)%64)
		}
		table, extents = append(table, x), append(extents, e)
	}
	if err := ranges.Prepare([][]mem.Extent{extents}); err != nil {
		b.Fatal(err)
	}
	ranges.Commit()
	for i := range n {
		ranged = append(ranged, expert(ranges.Bytes(0, i)))
	}
	for _, rows := range []int{1, 32} {
		x, out, ids := make([]float32, rows*hidden), make([]float32, rows*topK*hidden), make([]int32, rows*topK)
		for i := range ids {
			ids[i] = int32(i * 5 % n)
		}
		b.Run(fmt.Sprintf("rows=%d", rows), func(b *testing.B) {
			c.Experts(out, x, rows, topK, ids, table) // the first one touches the memory
			var spent [2]float64
			turn := 0
			for b.Loop() { // the second finds in the caches what the first has read, as the memory is the same: so in turns
				for i := range spent {
					form := (turn + i) % len(spent)
					experts := [][]model.Expert{table, ranged}[form]
					spent[form] += seconds(func() { c.Experts(out, x, rows, topK, ids, experts) })
				}
				turn++
			}
			b.ReportMetric(spent[1]/spent[0], "ranges/table")
		})
	}
}

func seconds(f func()) float64 {
	start := time.Now()
	f()
	return time.Since(start).Seconds()
}
