package hbm

import (
	"runtime"
	"testing"
	"time"
)

// Copies keep to the rate on the whole, whatever lies between them; only a long pause is not made up for.
func TestPacer(t *testing.T) {
	p := NewPacer(1000) // a byte a millisecond
	t0 := time.Unix(1000, 0)
	p.due = t0
	at := func(ms int) time.Time { return t0.Add(time.Duration(ms) * time.Millisecond) }
	for _, c := range []struct{ now, bytes, due int }{
		{30, 100, 100}, // that the first copy began late is made up for, too
		{100, 50, 150},
		{230, 50, 200},  // 80 ms were lost, and are made up for
		{230, 50, 250},  //
		{1000, 10, 810}, // of 750 ms only the last 200
		{1000, 500, 1310},
	} {
		if due := p.after(at(c.now), c.bytes); !due.Equal(at(c.due)) {
			t.Errorf("%d bytes at %d ms are within the rate after %v, want %d ms", c.bytes, c.now, due.Sub(t0), c.due)
		}
	}
	if NewPacer(0) != nil {
		t.Error("no rate is one")
	}
}

// More goroutines copy only where one is not enough for the rate, and never more than a quarter of the processors.
func TestCopiers(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	for _, c := range []struct {
		processors, want int
		rate             int64
	}{
		{16, 1, 1}, {16, 1, copierRate}, {16, 2, copierRate + 1}, {16, 4, 4 * copierRate}, {16, 4, 1 << 60},
		{8, 2, 4 * copierRate}, {2, 1, 4 * copierRate}, {1, 1, 1 << 60},
	} {
		runtime.GOMAXPROCS(c.processors)
		if n := NewPacer(c.rate).copiers(); n != c.want {
			t.Errorf("%d goroutines copy at %d bytes a second on %d processors, want %d", n, c.rate, c.processors, c.want)
		}
	}
}
