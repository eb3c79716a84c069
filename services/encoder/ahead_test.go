package encoder

import (
	"testing"
	"time"
)

// An encoder asks for a picture while one of its NPUs has none, and beside those that all have when the first of them is about to be
// done; the next one comes to that NPU.
func TestAhead(t *testing.T) {
	var held bool
	a := &ahead{hold: func(hold bool) { held = hold }}
	step := func(what string, hold bool, f func()) {
		t.Helper()
		if f(); held != hold {
			t.Errorf("%s: it wants no more: %v, want %v", what, held, hold)
		}
	}
	both := []int{0, 1}
	first := func(want int) {
		t.Helper()
		if slot := a.soonest(both); slot != want {
			t.Errorf("the NPU in slot %d is said to be free first, want %d", slot, want)
		}
	}
	var p [4]*preparation
	step("two NPUs", false, func() { a.widen(2) })
	step("one is prepared", false, func() { p[0] = a.begin() })
	step("two are prepared", true, func() { p[1] = a.begin() })
	step("one is in line", true, func() { p[0].ready(0) })
	step("both are in line", true, func() { p[1].ready(1) })
	a.prepare = time.Millisecond
	step("both have begun", true, func() {
		a.progress(0, 10*time.Millisecond, 7)
		a.progress(1, 10*time.Millisecond, 3)
	})
	first(1)
	step("the second is nearly done", false, func() { a.progress(1, time.Millisecond, 2) })
	step("a third is prepared", true, func() { p[2] = a.begin() })
	step("and waits there", true, func() { p[2].ready(a.soonest(both)) })
	step("and is next", true, func() { a.out(1) })
	first(0) // of the other one nothing is known yet
	step("nobody has the first NPU", false, func() { a.out(0) })
	first(0)
	step("it has two, and the other one none", false, func() {
		a.line(1).pictures, a.line(1).left = 2, time.Hour
	})
	step("what is prepared is for that", true, func() { p[3] = a.begin() })
	step("it was in vain", false, func() { p[3].end() })
}
