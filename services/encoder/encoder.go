// Package encoder is the encode stage: pixels to multimodal tokens. One message is one picture; a request's pictures
// are taken by whichever encoders are idle (intra-request parallelism, arXiv:2501.05460 section 3.2.2). It decodes and
// resizes the picture, runs the vision encoder, seals the MM object, and marks the join record; whoever completes that
// publishes the prefill message. A picture that is in the node's cache of MM objects is not encoded.
package encoder

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/engine"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/imageprep"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/runner"
	"trireme.dev/shared/wire"
)

// slots is how many pictures an encoder works on at once for each NPU: while one is on it, the next is fetched and decoded.
const slots = 2

// encoder is the running role.
type encoder struct {
	*stage.Stage
	prep    imageprep.Config
	decoder *decoder
	rows    prometheus.Counter
	took    runner.Observer
	line    line
	ahead   *ahead
}

// Run opens a stage process and serves the encode queue until ctx ends: Serve for those who have no stage open, as tests
// do; the command opens its own. It returns an error when it cannot start or loses the HMM.
func Run(ctx context.Context, cfg stage.Config, log *slog.Logger) error {
	s, err := stage.Open(ctx, stage.Encode, cfg, log)
	if err != nil {
		return err
	}
	defer s.Close()
	return Serve(ctx, s)
}

// Serve runs the encode stage on an open stage process.
func Serve(ctx context.Context, s *stage.Stage) error { return s.Serve(ctx, Role()) }

// Role is the encode stage as a role of a stage process.
func Role() stage.Role {
	return stage.Role{Name: stage.Encode, Slots: slots, Late: true, Finish: true, Start: start}
}

func start(s *stage.Stage) (stage.Worker, error) {
	if s.Model.Vision == nil {
		return nil, fmt.Errorf("model %s has no vision encoder: it needs no encode stage", s.Model.Name)
	}
	prep, err := imageprep.LoadConfig(s.Dir())
	if err != nil {
		return nil, err
	}
	v := s.Model.Vision
	if prep.PatchSize != v.Patch || prep.TemporalPatchSize != v.Temporal || prep.MergeSize != v.Merge {
		return nil, fmt.Errorf("preprocessor_config.json has patches of %d, %d frames, merge %d; config.json %d, %d, %d",
			prep.PatchSize, prep.TemporalPatchSize, prep.MergeSize, v.Patch, v.Temporal, v.Merge)
	}
	e := &encoder{
		Stage: s, prep: prep, decoder: newDecoder(prep),
		rows: s.Metrics.Rows.WithLabelValues(stage.Encode), took: s.Metrics.Encoded(),
		ahead: newAhead(s),
	}
	first, err := e.Prepare(s.NPUs())
	if err != nil {
		return nil, err
	}
	first.Switch()
	s.Runner.AddPieces(e.piece)
	return e, nil
}

// Close implements stage.Worker.
func (e *encoder) Close() {}

// Handle implements stage.Worker.
func (e *encoder) Handle(ctx context.Context, d *bus.Delivery) {
	var m wire.Encode
	if err := wire.Unmarshal(d.Data, &m); err != nil {
		e.Log.Error("dropping a message that is no encode message", "error", err)
		_ = d.Ack(ctx)
		return
	}
	prep := e.ahead.begin()
	defer prep.end()
	e.Work(ctx, d, m.Request, m.Part, func(ctx context.Context, claim *hbm.Claim) error { return e.encode(ctx, &m, claim, prep) })
}

// encode makes the MM object of one picture and marks it in the join record.
func (e *encoder) encode(ctx context.Context, m *wire.Encode, claim *hbm.Claim, prep *preparation) error {
	began := time.Now()
	key := wire.JoinKey(m.Request.ID, m.Request.Attempt)
	join, err := e.Bus.Join(ctx, key)
	if err != nil { // ErrNoJoin too: most likely the request has ended, and its gateway says so when it is told that the attempt is lost
		return err
	}
	if m.Part < 0 || m.Part >= len(join.Have) {
		return fmt.Errorf("picture %d of a request of %d", m.Part, len(join.Have))
	}
	if !join.Have[m.Part] { // else an earlier holder of the claim died between its mark and its ack
		handle, hit, err := e.object(ctx, m, &join.Prefill, claim, prep)
		if err != nil {
			return err
		}
		if !claim.Held() {
			return mem.ErrFenced
		}
		join, err = e.Bus.MarkJoin(ctx, key, m.Part, handle, hit)
		if err != nil {
			return err
		}
	}
	if !join.Complete() {
		return nil
	}
	if !claim.Held() {
		return mem.ErrFenced
	}
	id := fmt.Sprintf("%s.%d.p", m.Request.ID, m.Request.Attempt)
	join.Prefill.Place = join.Prefill.Place.After(time.Since(began)) // and the time in the queue, which nobody knows here
	if err := e.Bus.Publish(ctx, stage.Prefill, m.Request.ID, id, &join.Prefill); err != nil {
		return fmt.Errorf("publishing the prefill message: %w", err)
	}
	return nil
}

// maxWait bounds the wait for another encoder that works on the same picture for another request.
const maxWait = 20 * time.Second

// object returns the picture's sealed MM object, held by the request: the cached one (hit), or a new one, which is then
// cached. While another encoder makes it, it is waited for; if that one fails, one of those who wait makes it. There is
// none (a hit, with a zero handle) when prefill will find the picture's KV in the cache.
func (e *encoder) object(ctx context.Context, m *wire.Encode, p *wire.Prefill, claim *hbm.Claim, prep *preparation) (_ mem.Handle, hit bool, _ error) {
	grid, err := e.grid(m)
	if err != nil {
		return mem.Handle{}, false, err
	}
	key := e.key(m)
	found, ticket, err := e.HBM.FindMM(ctx, key, stage.Ref(m.Request), claim, 0)
	if err == nil && found == nil && ticket == nil { // somebody else makes it, or there is no cache
		prep.pause()
		found, ticket, err = e.HBM.FindMM(ctx, key, stage.Ref(m.Request), claim, min(maxWait, m.Request.Left))
		prep.resume()
	}
	if err != nil {
		return mem.Handle{}, false, fmt.Errorf("looking for picture %d in the cache: %w", m.Part+1, err)
	}
	if found != nil {
		return *found, true, nil
	}
	if e.needless(ctx, m, p) {
		if ticket != nil {
			e.settleTicket(ctx, ticket, nil)
		}
		return mem.Handle{}, true, nil
	}
	obj, handle, err := e.produce(ctx, m, grid, claim, prep)
	defer e.Free(ctx, obj)
	if ticket != nil {
		e.settleTicket(ctx, ticket, obj)
	}
	return handle, false, err
}

// needless reports whether the KV of the whole picture is in the cache, in the prefix that prefill will find. Nothing holds
// it until then: if it is evicted, prefill loses the attempt, so at a second one every picture is encoded. What is wrong
// with the spec is for prefill to say.
func (e *encoder) needless(ctx context.Context, m *wire.Encode, p *wire.Prefill) bool {
	if m.Request.Attempt > 1 {
		return false
	}
	spec, err := e.Spec(ctx, p.Inline, p.Spec)
	if err != nil || m.Part >= len(spec.Pictures) {
		return false
	}
	pic := &spec.Pictures[m.Part]
	end := kv.Blocks(pic.Offset + e.Tokens(pic.Grid)) // the first block behind the picture
	if end > stage.Reusable(spec) {
		return false
	}
	n, err := e.HBM.CountPrefix(ctx, e.anyNPU(), e.BlockKeys(spec, spec.Prompt)[:end])
	return err == nil && n == end
}

// settleTicket publishes obj under the ticket, or gives the ticket back when there is none. Failing to do so costs only
// the cache.
func (e *encoder) settleTicket(ctx context.Context, ticket *hbm.Ticket, obj *hbm.Object) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	var err error
	if obj != nil {
		err = e.HBM.PublishMM(ctx, ticket, obj)
	} else {
		err = e.HBM.AbandonMM(ctx, ticket)
	}
	if err != nil && !errors.Is(err, mem.ErrFenced) && !errors.Is(err, mem.ErrLost) {
		e.Log.Warn("caching a picture", "error", err)
	}
}

// key names what the picture becomes: its bytes, all that turns them into an MM object, and who may share that.
func (e *encoder) key(m *wire.Encode) hbm.Key {
	prep := e.prep.Digest()
	h := sha256.New()
	fmt.Fprintf(h, "trireme mm 1 %x %x %x %v %q %q", m.Content, prep, m.Model, m.Grid, e.Kernels(), m.Salt)
	return hbm.Key(h.Sum(nil))
}

// grid checks that the message is one for this encoder.
func (e *encoder) grid(m *wire.Encode) (engine.Grid, error) {
	if m.Model != e.Model.Digest {
		return engine.Grid{}, &stage.Fault{Status: 500, Err: fmt.Errorf("request is for model %x, this instance runs %x",
			m.Model[:6], e.Model.Digest[:6])}
	}
	grid := engine.Grid{T: m.Grid[0], H: m.Grid[1], W: m.Grid[2]}
	limit, merge := e.prep.MaxPixels/(e.prep.PatchSize*e.prep.PatchSize), e.Model.Vision.Merge
	if grid.T != 1 || grid.H < 1 || grid.W < 1 || grid.H > limit || grid.W > limit || grid.Patches() > limit ||
		grid.H%merge != 0 || grid.W%merge != 0 {
		return engine.Grid{}, &stage.Fault{Status: 500, Err: fmt.Errorf("picture %d has a patch grid of %v", m.Part+1, m.Grid)}
	}
	return grid, nil
}

// produce encodes the picture into a sealed MM object: this process' own until it is sealed, then held by the request too.
// The caller frees it; it is nil when there is an error.
func (e *encoder) produce(ctx context.Context, m *wire.Encode, grid engine.Grid, claim *hbm.Claim, prep *preparation) (*hbm.Object, mem.Handle, error) {
	pixels, err := e.pixels(ctx, m, grid, claim)
	if err != nil {
		return nil, mem.Handle{}, err
	}
	objs, seat, err := e.room(ctx, e.Tokens(m.Grid))
	if err != nil {
		return nil, mem.Handle{}, fmt.Errorf("allocating the MM object: %w", err)
	}
	defer seat.Leave()
	err = e.compute(ctx, &picture{npu: seat.NPU, out: objs[0].Floats(), pixels: pixels, grid: grid, claim: claim}, prep)
	e.Pass(claim)
	if err != nil {
		e.Free(ctx, objs...)
		return nil, mem.Handle{}, fmt.Errorf("encoding picture %d: %w", m.Part, err)
	}
	handles, err := e.HBM.Seal(ctx, stage.Ref(m.Request), objs...)
	if err != nil {
		e.Free(ctx, objs...)
		return nil, mem.Handle{}, fmt.Errorf("sealing the MM object: %w", err)
	}
	return objs[0], handles[0], nil
}

// freeFirst is the number of the NPU that can begin with another picture first, of those with the least in work; -1: none takes any.
func (e *encoder) freeFirst() int {
	slots := e.Idlest()
	if len(slots) == 0 {
		return -1
	}
	return e.NPUs()[e.ahead.soonest(slots)].Number
}

// room allocates an MM object of so many tokens on an NPU that has room for it.
func (e *encoder) room(ctx context.Context, tokens int) (objs []*hbm.Object, seat *stage.Seat, err error) {
	levels, hidden := e.Model.Vision.Levels(), e.Model.Text.Hidden
	spec := hbm.Spec{Kind: mem.KindMM, Bytes: int64(levels*tokens*hidden) * 4, Shape: []int{levels, tokens, hidden}}
	err = e.Seat(e.freeFirst(), e.SlabsOf(spec.Bytes), func(s *stage.Seat) (err error) {
		seat, spec.NPU = s, s.Number()
		objs, err = e.HBM.Alloc(ctx, spec)
		return err
	})
	return objs, seat, err
}

// pixels decodes the picture into patches [patches, PatchDim].
func (e *encoder) pixels(ctx context.Context, m *wire.Encode, grid engine.Grid, claim *hbm.Claim) ([]float32, error) {
	leave, err := e.Enter(ctx, claim)
	if err != nil {
		return nil, err
	}
	defer leave()
	src, err := e.HBM.Attach(ctx, mem.ReadOnly, -1, m.Pixels)
	if err != nil {
		return nil, fmt.Errorf("attaching picture %d: %w", m.Part, err)
	}
	defer e.Free(ctx, src...)
	if err := src[0].Verify(); err != nil {
		return nil, fmt.Errorf("reading picture %d: %w", m.Part, err)
	}
	pixels := make([]float32, grid.Patches()*e.prep.PatchDim())
	got, err := e.decoder.decode(ctx, src[0].Bytes(), pixels)
	if cause := ctx.Err(); err != nil && cause != nil {
		return nil, cause
	}
	if err != nil {
		return nil, &stage.Fault{Status: 400, Param: wire.PictureParam(m.Part), Err: err}
	}
	if (engine.Grid{T: got.T, H: got.H, W: got.W}) != grid {
		return nil, &stage.Fault{Status: 400, Param: wire.PictureParam(m.Part), Err: fmt.Errorf(
			"its header promised a patch grid of %v, its content has %v", m.Grid, got)}
	}
	e.Reached(claim, 1)
	return pixels, nil
}
