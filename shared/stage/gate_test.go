package stage_test

import (
	"context"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"
	"testing"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// witness sees who works at the same time.
type witness struct {
	mu     sync.Mutex
	works  map[*hbm.Claim]bool
	faults []string
	alone  map[string]int // times that a request worked with strikes
}

func (w *witness) work(k *hbm.Claim) {
	w.mu.Lock()
	w.works[k] = true
	suspects := 0
	for k := range w.works {
		if k.Strikes() > 0 {
			suspects++
		}
	}
	if suspects > 0 && len(w.works) > 1 {
		w.faults = append(w.faults, fmt.Sprintf("%d work, of them %d suspects", len(w.works), suspects))
	}
	if k.Strikes() > 0 {
		w.alone[k.Part().Request]++
	}
	w.mu.Unlock()
	for range 20 {
		runtime.Gosched()
	}
	w.mu.Lock()
	delete(w.works, k)
	w.mu.Unlock()
}

// bench is a role whose handlers have a section and then some pieces for the runner.
type bench struct {
	*stage.Stage
	witness *witness
	waiting []*workpiece // the runner's
}

type workpiece struct {
	claim *hbm.Claim
	left  int
	done  chan struct{}
}

func (b *bench) Close() {}

func (b *bench) Handle(ctx context.Context, d *bus.Delivery) {
	var m wire.Decode
	if err := wire.Unmarshal(d.Data, &m); err != nil {
		panic(err)
	}
	b.Work(ctx, d, m.Request, 0, b.work)
}

func (b *bench) work(ctx context.Context, claim *hbm.Claim) error {
	leave, err := b.Enter(ctx, claim)
	if err != nil {
		return err
	}
	b.witness.work(claim)
	leave()
	w := &workpiece{claim, 5, make(chan struct{})}
	b.Runner.Do(func() { b.waiting = append(b.waiting, w) })
	<-w.done
	b.Pass(claim)
	return nil
}

func (b *bench) piece() bool {
	i := slices.IndexFunc(b.waiting, func(w *workpiece) bool { return b.Turn(w.claim) })
	if i < 0 {
		return false
	}
	w := b.waiting[i]
	b.witness.work(w.claim)
	if w.left--; w.left == 2 {
		b.Reached(w.claim, 1) // from here on it is one of many
	}
	if w.left == 0 {
		b.waiting = slices.Delete(b.waiting, i, i+1)
		close(w.done)
	}
	return true
}

// Requests whose workers have died run alone until they make progress, whatever else the process has to do; all of them, and
// all others, come to an end. One with too many strikes is not run at all.
func TestSuspectsRunAlone(t *testing.T) {
	r := newRig(t, stagetest.Long)
	var reqs []wire.Request
	want := map[string]int{}
	for i := range 30 {
		req := r.Request(r.gateway.ID)
		reqs = append(reqs, req)
		if strikes := []int{0, 0, 1, 0, 0, 3}[i%6]; strikes > 0 && i < 18 {
			r.Strike(part(req), strikes)
			want[req.ID] = 1 + 3 // its section, and the pieces up to its progress
		}
	}
	r.Strike(part(reqs[0]), stage.Quarantine)
	w := &witness{works: map[*hbm.Claim]bool{}, alone: map[string]int{}}
	for _, req := range reqs {
		r.Publish(stage.Decode, req.ID, &wire.Decode{Request: req})
	}
	s, _ := r.Open(stage.Decode, func(ctx context.Context, s *stage.Stage) error {
		return s.Serve(ctx, stage.Role{Name: stage.Decode, Slots: 8, Start: func(s *stage.Stage) (stage.Worker, error) {
			b := &bench{Stage: s, witness: w}
			s.Runner.AddPieces(b.piece)
			return b, nil
		}})
	})
	r.Empty(stage.Decode)
	if got := r.Outcomes(s, "done"); got != len(reqs)-1 {
		t.Errorf("%d of %d are done", got, len(reqs))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.faults {
		t.Error(f)
	}
	if !maps.Equal(w.alone, want) {
		t.Errorf("times that requests worked alone: %v, want %v", w.alone, want)
	}
	lost := r.gateway.Lost(1)
	if len(lost) != 1 || lost[0].Request != reqs[0].ID || !lost[0].Final || lost[0].Status != 500 || lost[0].Code != wire.CodeQuarantined ||
		lost[0].Stage != stage.Decode {
		t.Errorf("told the gateway %+v", lost)
	}
	for _, req := range reqs {
		r.Done(req.ID, -1)
	}
	r.NoMemory()
}
