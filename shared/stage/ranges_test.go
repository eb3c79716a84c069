package stage

import (
	"testing"
	"unsafe"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/memtest"
	"trireme.dev/shared/model"
)

// An NPU's experts lie one behind the other in its ranges, with the content of the objects that they are; others come and go by
// epochs, and what is not committed leaves no trace.
func TestRanges(t *testing.T) {
	const page, layers, experts, rows = mem.HostPage, 2, 4, 8
	store, space := memtest.Host(t, layers*experts*2*page)
	has := map[*byte]mem.Extent{}
	all := make([][]model.Expert, layers)
	for l := range all {
		for e := range experts {
			x := mem.Extent{Offset: int64(l*experts+e) * 2 * page, Bytes: page}
			if err := store.Back(x); err != nil {
				t.Fatal(err)
			}
			if _, err := space.Map(x, mem.ReadWrite); err != nil {
				t.Fatal(err)
			}
			b := space.Bytes(x)
			has[unsafe.SliceData(b)] = x
			data := unsafe.Slice((*model.BF16)(unsafe.Pointer(unsafe.SliceData(b))), 3*rows*rows)
			for i := range data {
				data[i] = model.BF16(1000*l + 100*e + i)
			}
			m := func(i int) model.Matrix {
				return model.Matrix{Data: data[i*rows*rows : (i+1)*rows*rows], Rows: rows, Cols: rows}
			}
			all[l] = append(all[l], model.Expert{Gate: m(0), Up: m(1), Down: m(2)})
		}
	}
	some := func(which ...int) [][]model.Expert {
		table := make([][]model.Expert, layers)
		for l := range table {
			table[l] = make([]model.Expert, experts)
			for _, e := range which {
				table[l][e] = all[l][e]
			}
		}
		return table
	}
	r := newRanges(func(_ int, bytes int64) (mem.Window, error) { return space.Window(bytes) })
	prepare := func(which ...int) [][]model.Expert {
		t.Helper()
		table, err := r.prepare(7, some(which...), has)
		if err != nil {
			t.Fatal(err)
		}
		return table
	}
	check := func(table [][]model.Expert, which ...int) {
		t.Helper()
		for l := range table {
			var before *byte
			for _, e := range which {
				got, want := table[l][e], all[l][e]
				for i, m := range []model.Matrix{got.Gate, got.Up, got.Down} {
					w := []model.Matrix{want.Gate, want.Up, want.Down}[i]
					if m.Rows != w.Rows || m.Cols != w.Cols || string(bytesOf(m)) != string(bytesOf(w)) || &m.Data[0] == &w.Data[0] {
						t.Fatalf("layer %d, expert %d, matrix %d is not that of its object, at another address", l, e, i)
					}
				}
				if at := first(got); before != nil && uintptr(unsafe.Pointer(at))-uintptr(unsafe.Pointer(before)) != page {
					t.Errorf("layer %d: expert %d does not follow on the one before", l, e)
				} else {
					before = at
				}
			}
		}
	}
	now := prepare(0, 1, 2)
	r.commit()
	next := prepare(1, 3)
	check(now, 0, 1, 2)
	check(next, 1, 3)
	if err := r.keep([]int{7}); err != nil { // it is given up
		t.Fatal(err)
	}
	check(now, 0, 1, 2)
	next = prepare(3)
	r.commit()
	if err := r.keep([]int{7}); err != nil {
		t.Fatal(err)
	}
	check(next, 3)
	if got := r.mapped(); got.Maps != layers*(3+2+1) || got.Unmaps != layers*(2+3) {
		t.Errorf("counted %+v", got)
	}
	if none := prepare(); none[0][3].Gate.Data != nil {
		t.Error("an NPU without experts has one")
	}
	r.commit()
	if err := r.keep([]int{7}); err != nil {
		t.Fatal(err)
	}
	if got := r.mapped(); got.Unmaps != got.Maps {
		t.Errorf("experts that nobody has are mapped: %+v", got)
	}
	if err := r.keep(nil); err != nil || len(r.byNPU) != 0 {
		t.Errorf("an NPU that has left: %v, %d ranges", err, len(r.byNPU))
	}
	for l := range all { // nothing in a window is in the way
		for e := range all[l] {
			if err := space.Unmap(has[first(all[l][e])]); err != nil {
				t.Error(err)
			}
		}
	}
}

func bytesOf(m model.Matrix) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(m.Data))), 2*len(m.Data))
}
