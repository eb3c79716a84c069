package gateway

import "testing"

// What requests in work keep for dead letters is bounded, together; what is not kept takes nothing.
func TestKeptBytesAreBounded(t *testing.T) {
	var y graveyard
	a, b := &kept{yard: &y}, &kept{yard: &y}
	if !a.take(deadBytes-10) || b.take(11) || !b.take(4) || !b.take(6) || b.take(1) {
		t.Error("not as many bytes as there are")
	}
	a.release()
	a.release()
	if !b.take(deadBytes - 10) {
		t.Error("bytes that were released are not there")
	}
	b.release()
	if n := y.bytes.Load(); n != 0 {
		t.Errorf("%d bytes are taken by nobody", n)
	}
}
