package stage_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"reflect"
	"testing"
	"unsafe"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/hmm"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
)

// servePerNPU runs an HMM whose NPUs are memory domains.
func servePerNPU(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
	return hmm.Run(ctx, hmm.Config{Socket: socket, Node: "n", NPUs: 4, NPUBytes: 1 << 20, HostBytes: 1 << 20, NATS: conn, PerNPU: true}, log)
}

// third are the experts that an NPU has which comes to two others; every third one, shifted by the turn.
func third(turn int) func(layer, expert int) bool {
	return func(layer, expert int) bool { return (layer+expert+turn)%3 == 0 }
}

// same compares two matrices. Their elements go as bytes: one by one the race detector takes minutes for what is compared here.
func same(a, b model.Matrix) bool {
	data := func(m model.Matrix) []byte {
		return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(m.Data))), len(m.Data)*int(unsafe.Sizeof(model.BF16(0))))
	}
	return a.Rows == b.Rows && a.Cols == b.Cols && bytes.Equal(data(a), data(b))
}

// checkExperts compares the experts of an NPU with those wanted of the model.
func checkExperts(t *testing.T, got [][]model.Expert, want *model.Weights, wanted func(layer, expert int) bool) (n int) {
	t.Helper()
	for l := range want.Layers {
		for e, x := range want.Layers[l].Experts {
			if !wanted(l, e) {
				x = model.Expert{}
			} else {
				n++
			}
			if y := got[l][e]; !same(y.Gate, x.Gate) || !same(y.Up, x.Up) || !same(y.Down, x.Down) {
				t.Fatalf("expert %d of layer %d is another", e, l)
			}
		}
	}
	return n
}

// An NPU that joins gets its weights by copy from those of the instance, none from the files; it can have others of them, and leaves.
// After 200 times memory is where it was.
func TestWeightsOfAnNPUThatJoins(t *testing.T) {
	r := &rig{Rig: stagetest.New(t, servePerNPU, stagetest.Long), T: t}
	cfg := r.Stage
	cfg.NPUs = 2
	s, err := stage.Open(t.Context(), stage.Decode, cfg, r.Rig.Log)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	join := func() int {
		joined, err := s.HBM.JoinAny(t.Context(), 1)
		must(err)
		return joined[0]
	}
	leave := func(npu int) {
		must(s.ReleaseWeights(npu))
		must(s.HBM.Part(t.Context(), npu))
	}
	var before hbm.Stats
	for turn := range 200 {
		npu, copied := join(), r.Stats().Copied
		var last int64
		a, err := s.AttachWeights(t.Context(), npu, third(turn), stage.AttachOptions{Told: func(done, _ int64) { last = done }})
		must(err)
		checkExperts(t, a.Experts, r.Model.Weights, third(turn))
		first := turn < 3 // then they rest there
		if a.Read != 0 || a.Bytes == 0 || last != a.Bytes || a.Copied != r.Stats().Copied-copied || first != (a.Copied == a.Bytes) || !first && a.Copied != 0 {
			t.Fatalf("turn %d: of %d bytes %d were copied and %d read, %d told", turn, a.Bytes, a.Copied, a.Read, last)
		}
		if !same(a.Weights.Embed, r.Model.Weights.Embed) || !same(a.Weights.Layers[1].Q, r.Model.Weights.Layers[1].Q) {
			t.Fatal("the NPU has other attention weights")
		}
		leave(npu)
		if turn < 3 {
			before = r.Stats()
		} else if now := r.Stats(); !reflect.DeepEqual(now.Shared, before.Shared) || now.Holds != before.Holds || now.Copied != before.Copied {
			t.Fatalf("after turn %d %+v; before %+v", turn, now, before)
		}
	}

	npu := join() // it gets more, then has less
	all := func(int, int) bool { return true }
	_, err = s.AttachWeights(t.Context(), npu, third(0), stage.AttachOptions{})
	must(err)
	b, err := s.AttachWeights(t.Context(), npu, all, stage.AttachOptions{})
	must(err)
	if n := checkExperts(t, b.Experts, r.Model.Weights, all); n == 0 || b.Bytes != 2*before.Shared[npu].Used/3 {
		t.Errorf("with all of %d experts %d bytes more", n, b.Bytes)
	}
	must(s.DropWeights(npu, third(1)))
	if held := r.Stats().Shared[npu]; held.Used+held.Padded-held.Cached != (held.Used+held.Padded)/3 {
		t.Errorf("after all but a third were dropped: %+v", held)
	}
	c, err := s.AttachWeights(t.Context(), npu, third(1), stage.AttachOptions{})
	must(err)
	if c.Bytes != 0 {
		t.Errorf("what was kept was mapped anew: %d bytes", c.Bytes)
	}
	leave(npu)
}

// An attach that fails leaves what there was.
func TestFailedAttachOfWeights(t *testing.T) {
	r := &rig{Rig: stagetest.New(t, servePerNPU, stagetest.Long), T: t}
	s, err := stage.Open(t.Context(), stage.Decode, r.Stage, r.Rig.Log)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.HBM.Join(t.Context(), 3); err != nil {
		t.Fatal(err)
	}
	if _, err := s.AttachWeights(t.Context(), 3, third(0), stage.AttachOptions{}); err != nil {
		t.Fatal(err)
	}
	before := r.Stats()
	ctx, cancel := context.WithCancel(t.Context())
	_, err = s.AttachWeights(ctx, 3, func(int, int) bool { return true }, stage.AttachOptions{Rate: 1, Told: func(int64, int64) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled attach: %v", err)
	}
	if a, b := before.Shared[3], r.Stats().Shared[3]; b.Used-b.Cached != a.Used-a.Cached {
		t.Errorf("before %+v; after %+v", a, b)
	}
	if err := s.HBM.Part(t.Context(), 3); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("left an NPU with weights: %v", err)
	}
	if err := errors.Join(s.ReleaseWeights(3), s.HBM.Part(t.Context(), 3)); err != nil {
		t.Error(err)
	}
}
