package leaktest

import (
	"testing"
	"time"

	"go.uber.org/goleak"
)

// late leaves a goroutine behind that ends later than goleak waits.
type late struct{}

func (late) Run() int {
	go time.Sleep(2 * time.Second)
	return 0
}

// A goroutine that ends late, but ends, is no leak, and is waited for no longer than it is there.
func TestLateGoroutine(t *testing.T) {
	before := goleak.IgnoreCurrent()
	began := time.Now()
	p := patient{late{}, []goleak.Option{before}}
	if code := p.Run(); code != 0 {
		t.Errorf("the tests ended with %d", code)
	}
	if err := goleak.Find(before); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took >= patience {
		t.Errorf("it was waited for for %v", took)
	}
}
