package elastic

import (
	"reflect"
	"testing"

	"trireme.dev/shared/sched/placement"
)

func TestRecent(t *testing.T) {
	var r Recent
	if load, rows := r.Load(nil); load != nil || rows != 0 {
		t.Errorf("before any: %v, %d", load, rows)
	}
	for _, x := range []struct{ total, want placement.Load }{
		{placement.Load{{0, 0}, {}}, nil},
		{placement.Load{{80, 8}, {}}, placement.Load{{80, 8}, {}}},
		{placement.Load{{80, 8}, {}}, placement.Load{{80, 8}, {}}}, // nothing has come: nothing fades
		{placement.Load{{80, 18}, {}}, placement.Load{{70, 17}, {}}},
	} {
		r.Add(x.total)
		if got, _ := r.Load(nil); !reflect.DeepEqual(got, x.want) {
			t.Errorf("of %v: %v, want %v", x.total, got, x.want)
		}
	}
	if _, rows := r.Load(nil); rows != 87 {
		t.Errorf("%d rows", rows)
	}
}

// Whoever asks sees also what has come since the last part, and nothing fades by that.
func TestRecentIsAskedOften(t *testing.T) {
	var r Recent
	if got, rows := r.Load(placement.Load{{4, 1}, {}}); rows != 5 || !reflect.DeepEqual(got, placement.Load{{4, 1}, {}}) {
		t.Errorf("before the first part ends: %v, %d", got, rows)
	}
	r.Add(placement.Load{{80, 8}, {}})
	for range 3 {
		if got, rows := r.Load(placement.Load{{81, 10}, {}}); rows != 91 || !reflect.DeepEqual(got, placement.Load{{81, 10}, {}}) {
			t.Errorf("%v, %d", got, rows)
		}
	}
	r.Add(placement.Load{{81, 18}, {}})
	if got, _ := r.Load(nil); !reflect.DeepEqual(got, placement.Load{{71, 17}, {}}) {
		t.Errorf("after the next part: %v", got)
	}
}

func TestSlots(t *testing.T) {
	layout := placement.Even([]int{0, 16}, placement.First(4))
	for _, x := range []struct {
		npus  int
		spare float64
		want  int
	}{{4, 0, 4}, {4, 0.25, 5}, {3, 0, 6}, {3, 0.25, 8}, {1, 1, 16}, {4, 0.01, 5}} {
		if got := Slots(layout, x.npus, x.spare); got != x.want {
			t.Errorf("%d NPUs, %g spare: %d, want %d", x.npus, x.spare, got, x.want)
		}
	}
}
