package encoder_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/encoder"
	"trireme.dev/services/hmm"
	"trireme.dev/shared/engine"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/leaktest"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

func TestMain(m *testing.M) {
	stagetest.Child(stage.Encode, encoder.Serve)
	leaktest.VerifyTestMain(m)
}

func serveHMM(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
	return hmm.Run(ctx, hmm.Config{Socket: socket, Node: "n", NPUs: 5, NPUBytes: 16 << 20, HostBytes: 16 << 20, NATS: conn, MMCache: -1}, log)
}

// rig is a test's surroundings with a gateway.
type rig struct {
	*stagetest.Rig
	*testing.T
	gateway *stagetest.Gateway
}

func newRig(t *testing.T, ackWait time.Duration) *rig {
	t.Helper()
	r := &rig{Rig: stagetest.New(t, serveHMM, ackWait), T: t}
	r.gateway = r.Gateway()
	return r
}

// encoder starts an encoder.
func (r *rig) encoder() (*stage.Stage, func()) {
	r.Helper()
	return r.Open(stage.Encode, encoder.Serve)
}

// request is what a gateway makes of a reference case: the join record, and a message a picture, not yet published.
func (r *rig) request(c *stagetest.Case) (wire.Request, []*wire.Encode) {
	r.Helper()
	return r.prepare(c, r.Request(r.gateway.ID))
}

func (r *rig) prepare(c *stagetest.Case, req wire.Request) (wire.Request, []*wire.Encode) {
	r.Helper()
	join := &wire.Join{Prefill: wire.Prefill{Request: req, Inline: []byte("spec"), MM: make([]mem.Handle, len(c.Images))},
		Have: make([]bool, len(c.Images))}
	if err := r.Bus.CreateJoin(r.Context(), wire.JoinKey(req.ID, req.Attempt), join); err != nil {
		r.Fatal(err)
	}
	var out []*wire.Encode
	for i, file := range c.Images {
		data := r.Model.Picture(file)
		out = append(out, &wire.Encode{Request: req, Part: i, Pixels: r.Put(req, mem.KindPixels, data), Grid: c.Grids[i],
			Content: sha256.Sum256(data), Model: r.Model.Config.Digest})
	}
	return req, out
}

func (r *rig) publish(messages ...*wire.Encode) {
	r.Helper()
	for _, m := range messages {
		r.Publish(stage.Encode, m.Request.ID, m)
	}
}

// joined takes the one prefill message of a request, and checks that there is no other.
func (r *rig) joined(req wire.Request) *wire.Prefill {
	r.Helper()
	m := new(wire.Prefill)
	if err := wire.Unmarshal(r.Pull(stage.Prefill, 1)[0].Data, m); err != nil {
		r.Fatal(err)
	}
	if m.Request != req || string(m.Inline) != "spec" {
		r.Errorf("prefill message %+v", m)
	}
	r.Empty(stage.Encode)
	if waiting, _ := r.Queue(stage.Prefill); waiting != 0 {
		r.Errorf("%d prefill messages too many", waiting)
	}
	return m
}

// embeddings reads an MM object, as a prefill does.
func (r *rig) embeddings(h mem.Handle) []float32 {
	r.Helper()
	o := r.Attach(mem.ReadOnly, h)
	defer r.Free(o)
	if err := o.Verify(); err != nil {
		r.Error(err)
	}
	if h.Kind != mem.KindMM || !h.Sealed || len(h.Shape) != 3 || int64(h.Shape[0]*h.Shape[1]*h.Shape[2]*4) != h.Bytes {
		r.Errorf("MM object %+v", h)
	}
	return slices.Clone(o.Floats())
}

func grid(g [3]int) engine.Grid { return engine.Grid{T: g[0], H: g[1], W: g[2]} }

// What comes out of the MM object is what transformers has computed from the picture.
func TestReferenceEmbeddings(t *testing.T) {
	const tolerance = 5e-4 // absolute, in float32 over bf16 weights
	r := newRig(t, stagetest.Long)
	r.encoder()
	for _, i := range []int{6, 9, 14} {
		c := stagetest.Cases(t)[i]
		req, messages := r.request(&c)
		r.publish(messages...)
		got := r.embeddings(r.joined(req).MM[0])
		f, err := hf.OpenSafetensors(stagetest.Root("shared/testdata/golden/shapes-vl-moe/" + c.Name + ".safetensors"))
		if err != nil {
			t.Fatal(err)
		}
		levels := r.Model.Config.Vision.Levels()
		plane := len(got) / levels
		for level := range levels {
			name := "image_embeds"
			if level > 0 {
				name = fmt.Sprint("deepstack_", level-1)
			}
			tensor, ok := f.Tensor(name)
			if !ok {
				t.Fatalf("%s has no %s", c.Name, name)
			}
			want, err := tensor.Float32s()
			if err != nil || len(want) != plane {
				t.Fatalf("%s: %s has %d values, the object %d: %v", c.Name, name, len(want), plane, err)
			}
			worst := 0.0
			for k, w := range want {
				worst = max(worst, math.Abs(float64(got[level*plane+k])-float64(w)))
			}
			if !(worst <= tolerance) {
				t.Errorf("%s: %s is off by %.2g", c.Name, name, worst)
			}
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		r.Done(req.ID, -1)
	}
	r.NoMemory()
	r.gateway.NothingLost()
}

// Ten pictures over three encoders: one prefill message, with every picture in its place.
func TestPicturesAreEncodedInParallel(t *testing.T) {
	r := newRig(t, stagetest.Long)
	var stages []*stage.Stage
	for range 3 {
		s, _ := r.encoder()
		stages = append(stages, s)
	}
	c := stagetest.Cases(t)[23]
	for range 3 { // whoever is last differs
		req, messages := r.request(&c)
		r.publish(messages...)
		m := r.joined(req)
		for i, h := range m.MM {
			if !slices.Equal(r.embeddings(h), r.Model.Embed(r.Model.Picture(c.Images[i]), grid(c.Grids[i]))) {
				t.Errorf("picture %d is not in its place", i)
			}
		}
		r.Done(req.ID, -1)
	}
	busy, done := 0, 0
	for _, s := range stages {
		n := r.Outcomes(s, "done")
		done += n
		if n > 0 {
			busy++
		}
	}
	if busy < 2 || done != 30 {
		t.Errorf("%d encoders did %d pictures", busy, done)
	}
	r.NoMemory()
	r.gateway.NothingLost()
}

// A shard whose holder died between its mark and its ack completes the request when it comes again, without encoding.
func TestMarkedShardPublishes(t *testing.T) {
	r := newRig(t, stagetest.Long)
	c := stagetest.Cases(t)[12] // three pictures
	req, messages := r.request(&c)
	var handles []mem.Handle
	for i := range messages {
		h := r.Put(req, mem.KindMM, []byte{byte(i)})
		if _, err := r.Bus.MarkJoin(t.Context(), wire.JoinKey(req.ID, 1), i, h, false); err != nil {
			t.Fatal(err)
		}
		handles = append(handles, h)
	}
	r.encoder()
	r.publish(messages[1])
	m := r.joined(req)
	for i, h := range m.MM {
		if h.Object != handles[i].Object {
			t.Errorf("picture %d was encoded again", i)
		}
	}
	r.publish(messages[2]) // once more: the message is deduplicated
	r.Empty(stage.Encode)
	if waiting, _ := r.Queue(stage.Prefill); waiting != 0 {
		t.Errorf("%d prefill messages too many", waiting)
	}
	r.Done(req.ID, -1)
	r.NoMemory()
}

// An encoder that is killed is succeeded at once, and leaves no memory.
func TestKilledEncoderIsSucceeded(t *testing.T) {
	r := newRig(t, stagetest.Long)
	c := stagetest.Cases(t)[23]
	var requests []wire.Request
	for range 4 {
		req, messages := r.request(&c)
		r.publish(messages...)
		requests = append(requests, req)
	}
	r.KillInTheMiddle(stage.Encode, 1, stagetest.Middle{Piece: 20}) // of the third picture or so
	r.encoder()
	seen := map[string]bool{}
	for _, d := range r.Pull(stage.Prefill, len(requests)) {
		m := new(wire.Prefill)
		if err := wire.Unmarshal(d.Data, m); err != nil {
			t.Fatal(err)
		}
		seen[m.Request.ID] = true
		for i, h := range m.MM {
			if !slices.Equal(r.embeddings(h), r.Model.Embed(r.Model.Picture(c.Images[i]), grid(c.Grids[i]))) {
				t.Errorf("picture %d of %s is wrong", i, m.Request.ID)
			}
		}
	}
	r.Empty(stage.Encode)
	for _, req := range requests {
		if !seen[req.ID] {
			t.Errorf("no prefill message of %s", req.ID)
		}
		r.Done(req.ID, -1)
	}
	r.NoMemory()
	r.gateway.NothingLost()
}

// The client's faults are final and name their parameter; what another attempt may mend is not; what nobody waits for
// is acknowledged. Nothing is left of any.
func TestFaults(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, _ := r.encoder()
	c := stagetest.Cases(t)[3]
	data := r.Model.Picture(c.Images[0])
	n, ended := 0, 0
	for name, x := range map[string]struct {
		status int // of a final fault, 0: another attempt is made, -1: nobody waits
		spoil  func(*wire.Encode)
	}{
		"truncated":     {400, func(m *wire.Encode) { m.Pixels = r.Put(m.Request, mem.KindPixels, data[:len(data)/2]) }},
		"no picture":    {400, func(m *wire.Encode) { m.Pixels = r.Put(m.Request, mem.KindPixels, []byte("no picture")) }},
		"another grid":  {400, func(m *wire.Encode) { m.Grid = [3]int{1, 12, 14} }},
		"odd grid":      {500, func(m *wire.Encode) { m.Grid = [3]int{1, 11, 12} }},
		"huge grid":     {500, func(m *wire.Encode) { m.Grid = [3]int{1, 1 << 40, 1 << 40} }},
		"video":         {500, func(m *wire.Encode) { m.Grid = [3]int{2, 12, 12} }},
		"another model": {500, func(m *wire.Encode) { m.Model[0] ^= 1 }},
		"damaged":       {0, func(m *wire.Encode) { m.Pixels = r.Spoiled(m.Request, mem.KindPixels, data) }},
		"freed":         {0, func(m *wire.Encode) { m.Pixels.Generation-- }},
		"part":          {0, func(m *wire.Encode) { m.Part = 1 }},
		"no join": {0, func(m *wire.Encode) {
			if err := r.Bus.DeleteJoin(t.Context(), wire.JoinKey(m.Request.ID, 1)); err != nil {
				t.Fatal(err)
			}
		}},
		"old attempt": {-1, func(m *wire.Encode) {
			part := hbm.Part{Request: m.Request.ID, Attempt: 2, Stage: stage.Encode}
			if _, err := r.HBM.Claim(t.Context(), part, "nowhere"); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		req, messages := r.request(&c)
		x.spoil(messages[0])
		r.publish(messages[0])
		if x.status < 0 {
			ended++
			r.Until(name+" is settled", func() bool { return r.Outcomes(s, "ended") == ended })
		} else {
			n++
			lost := r.gateway.Lost(n)[n-1]
			param := map[int]string{400: wire.PictureParam(0)}[x.status]
			if lost.Request != req.ID || lost.Final != (x.status > 0) || x.status > 0 && lost.Status != x.status || lost.Param != param {
				t.Errorf("%s: %+v", name, lost)
			}
		}
		r.Done(req.ID, -1)
	}
	r.Empty(stage.Encode)
	if waiting, _ := r.Queue(stage.Prefill); waiting != 0 || r.Outcomes(s, "lost") != n {
		t.Errorf("%d prefill messages, %d attempts lost of %d", waiting, r.Outcomes(s, "lost"), n)
	}
	r.NoMemory()
}

// A message may outlive its request and the HMM that remembered the request's end: the claim makes it known to the HMM once
// more, and who has claimed it tells the HMM that it has ended, as the gateway says.
func TestMessageOfAnEndedRequest(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, _ := r.encoder()
	c := stagetest.Cases(t)[3]
	r.gateway.Set(func() { r.gateway.Without = true })
	req, messages := r.request(&c)
	if err := r.Bus.DeleteJoin(t.Context(), wire.JoinKey(req.ID, 1)); err != nil {
		t.Fatal(err)
	}
	r.publish(messages[0])
	r.Until("the message is settled", func() bool { return r.Outcomes(s, "lost") == 1 })
	r.NoRequest()
	r.NoMemory()
	r.Empty(stage.Encode)
}

// A stage for a model without vision says so.
func TestTextModelNeedsNoEncoder(t *testing.T) {
	r := newRig(t, stagetest.Long)
	cfg := r.Stage
	cfg.Model = stagetest.Root("shared/testdata/families/qwen3_moe")
	if err := encoder.Run(t.Context(), cfg, r.Rig.Log); err == nil {
		t.Error("an encoder runs without a vision encoder")
	}
}
