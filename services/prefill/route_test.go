package prefill_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/decoder"
	"trireme.dev/services/encoder"
	"trireme.dev/services/hmm"
	"trireme.dev/services/prefill"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// apart is a rig whose NPUs are memory domains of their own, with a cache.
func apart(t *testing.T) *rig {
	t.Helper()
	serve := func(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
		return hmm.Run(ctx, hmm.Config{
			Socket: socket, Node: "n", NPUs: 4, NPUBytes: 64 << 20, HostBytes: 16 << 20, NATS: conn, KVCache: 32 << 20, PerNPU: true,
		}, log)
	}
	r := &rig{Rig: stagetest.New(t, serve, stagetest.Long), T: t}
	r.Stage.OfferTimeout = 4 * time.Second // a slow machine is no silent one
	r.gateway = r.Gateway()
	return r
}

// slow has a stage believe that copies take long, so that it offers what would have to be copied.
func slow(s *stage.Stage) {
	s.Copied(context.Background(), stage.Copy{Role: stage.Prefill, Bytes: 1 << 20}, time.Now().Add(-10*time.Second))
}

// idle waits until stages have nothing in work, not even what is settled already: they bid by that.
func (r *rig) idle(stages ...*stage.Stage) {
	r.Helper()
	for _, s := range stages {
		r.Until(s.ID+" is idle", func() bool { return s.LoadWithout("") == sched.Load{} })
	}
}

// ending is a prompt of more than a slab and an end of its own.
func (r *rig) ending(i int) *wire.Spec {
	input := stagetest.Cases(r.T)[1].Input
	prompt := slices.Repeat(input, 20)
	if kv.Blocks(len(prompt)) < kv.SlabBlocks+2 {
		r.Fatalf("a prompt of %d tokens", len(prompt))
	}
	return r.Model.Greedy(append(prompt, input[i%len(input)], input[i/len(input)]), 5)
}

// compute has one more request computed, and checks its first token.
func (r *rig) compute(spec *wire.Spec) {
	r.Helper()
	m := r.start(spec)
	d := r.decodes(1)[m.Request.ID+"/0"]
	if got, want := r.token(r.open(d).log, 0), r.Model.Answer(spec, 0).IDs[0]; got != want {
		r.Errorf("first token %d, want %d", got, want)
	}
	r.Done(m.Request.ID, -1)
}

// Prompts that begin alike are computed where their beginning is, whoever takes them from the queue: nothing is copied. They are not
// when whoever has it is busy.
func TestPromptsGoWhereTheirBeginningIs(t *testing.T) {
	r := apart(t)
	has, meter := r.metered(prefill.Config{})
	r.compute(r.ending(0))
	r.idle(has)
	r.Stage.OfferWait = time.Millisecond // less than any prompt takes
	other, _ := r.prefill(prefill.Config{})
	slow(other)
	before := r.Copied(other, stage.Prefill)
	n := 1
	for ; r.Offers(other, "taken") < 3; n++ {
		if n > 200 {
			t.Fatal("the other one never offers anything")
		}
		r.compute(r.ending(n))
		r.idle(has, other)
	}
	if a, b := r.Outcomes(has, "done"), r.Outcomes(other, "done"); a != n || b != 0 {
		t.Errorf("of %d prompts %d were computed where their beginning is, %d elsewhere", n, a, b)
	}
	if a, b := r.Offers(has, "accepted"), r.Offers(other, "taken"); a != b || r.Copied(other, stage.Prefill) != before {
		t.Errorf("%d offers accepted, %d taken, %d bytes copied", a, b, r.Copied(other, stage.Prefill)-before)
	}
	r.Empty(stage.Prefill)

	meter.Hold(meter.Begun())
	long := r.ending(n)
	long.Prompt = append(long.Prompt, slices.Repeat(stagetest.Cases(t)[1].Input, 100)...)
	held := r.start(long)
	meter.Await()
	has.Hold(stage.Prefill, true) // it would never end what it takes itself
	for i := 0; r.Outcomes(other, "done") == 0; i++ {
		if i > 200 {
			t.Fatal("the other one computes nothing")
		}
		r.compute(r.ending(n + 1 + i))
	}
	if r.Offers(other, "refused") == 0 || r.Copied(other, stage.Prefill) == before {
		t.Errorf("%d offers refused by a busy instance, %d bytes copied", r.Offers(other, "refused"), r.Copied(other, stage.Prefill)-before)
	}
	meter.Release()
	r.decodes(1)
	r.Done(held.Request.ID, -1)
	r.gateway.NothingLost()
}

// Of an instance's own NPUs the one that has a prompt's beginning computes the rest, while it has no more in work than another one:
// then the beginning is copied there.
func TestPromptsGoToTheNPUOfTheirBeginning(t *testing.T) {
	r := apart(t)
	r.Stage.NPUs = 2
	s, meter := r.metered(prefill.Config{})
	on := func(m *wire.Decode) int { return int(m.Log.NPU) }
	npus := []int{s.NPUs()[0].Number, s.NPUs()[1].Number}
	salted := func(salt string, i int) *wire.Spec {
		spec := r.ending(i)
		spec.Salt = salt
		return spec
	}
	free := func() {
		t.Helper()
		r.Until("places are free", func() bool { return s.Held(0).Seqs+s.Held(1).Seqs == 0 })
	}
	r.compute(r.ending(0))
	free()
	// Two that come at once are computed one on each; what began on the second NPU goes on there.
	meter.Hold(meter.Begun())
	first := r.start(salted("a", 0))
	meter.Await()
	second := r.start(salted("b", 0))
	r.Until("the second has a place", func() bool { return s.Held(1).Seqs == 1 })
	meter.Release()
	d := r.decodes(2)
	if a, b := on(d[first.Request.ID+"/0"]), on(d[second.Request.ID+"/0"]); a != npus[0] || b != npus[1] {
		t.Fatalf("prompts were computed on the NPUs %d and %d, want %v", a, b, npus)
	}
	r.Done(first.Request.ID, -1)
	r.Done(second.Request.ID, -1)
	slow(s)
	before := r.Copied(s, stage.Prefill)
	for i := range 3 {
		free()
		m := r.start(salted("b", i+1))
		d := r.decodes(1)[m.Request.ID+"/0"]
		if got, want := r.token(r.open(d).log, 0), r.Model.Answer(salted("b", i+1), 0).IDs[0]; got != want {
			t.Errorf("first token %d, want %d", got, want)
		}
		if on(d) != npus[1] {
			t.Errorf("computed on NPU %d, its beginning is on %d", on(d), npus[1])
		}
		r.Done(m.Request.ID, -1)
	}
	if n := r.Copied(s, stage.Prefill) - before; n != 0 {
		t.Errorf("%d bytes were copied", n)
	}
	free()
	// Of two at once whose beginning is on the first NPU the second comes to the other NPU.
	meter.Hold(meter.Begun())
	first = r.start(salted("a", 5))
	meter.Await()
	second = r.start(salted("a", 6))
	r.Until("the second has a place", func() bool { return s.Held(1).Seqs == 1 })
	meter.Release()
	d = r.decodes(2)
	if a, b := on(d[first.Request.ID+"/0"]), on(d[second.Request.ID+"/0"]); a != npus[0] || b != npus[1] {
		t.Errorf("prompts were computed on the NPUs %d and %d, want %v", a, b, npus)
	}
	r.Empty(stage.Prefill)
	r.gateway.NothingLost()
}

// elsewhere starts the HMM of another node, which serves none: stages that are opened from now on are there.
func (r *rig) elsewhere() {
	r.Helper()
	conn, err := nats.Connect(r.NATS.URL())
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(conn.Close)
	r.Stage.HMM += "2"
	socket := r.Stage.HMM
	r.Go("hmm of another node", func(ctx context.Context) error {
		return hmm.Run(ctx, hmm.Config{
			Socket: socket, Node: "other", NPUs: 2, NPUBytes: 64 << 20, HostBytes: 16 << 20, NATS: conn, KVCache: 32 << 20,
		}, r.Log)
	})
}

// A sequence stays on the node of its prompt if a decoder there is idle.
func TestSequencesStayOnTheNodeOfTheirPrompt(t *testing.T) {
	r := apart(t)
	has, _ := r.Open(stage.Prefill+wire.RoleSeparator+stage.Decode, func(ctx context.Context, s *stage.Stage) error {
		return s.Serve(ctx, prefill.Role(prefill.Config{}), decoder.Role(decoder.Config{}))
	})
	r.elsewhere()
	other, _ := r.Open(stage.Decode, func(ctx context.Context, s *stage.Stage) error { return decoder.Serve(ctx, s, decoder.Config{}) })
	slow(other)
	for i := 0; r.Offers(other, "taken") < 2; i++ {
		if i > 200 {
			t.Fatal("the other node never offers anything")
		}
		spec := r.ending(i)
		m := r.start(spec)
		if a, want := r.gateway.Ended(m.Request.ID, 0), r.Model.Answer(spec, 0).IDs; !slices.Equal(a.IDs, want) {
			t.Errorf("answer %v, want %v", a.IDs, want)
		}
		r.Done(m.Request.ID, -1)
		r.idle(has, other)
	}
	r.Empty(stage.Decode)
	if n := r.Outcomes(other, "done"); n != 0 || r.Offers(has, "accepted") != r.Offers(other, "taken") {
		t.Errorf("%d sequences on the other node, %d of its offers accepted, %d taken", n, r.Offers(has, "accepted"), r.Offers(other, "taken"))
	}
	r.gateway.NothingLost()
}

// What another node has computed of a prompt is not computed again: the prompt goes there.
func TestPromptsGoToTheNodeOfTheirBeginning(t *testing.T) {
	r := apart(t)
	profile := filepath.Join(t.TempDir(), "slow.yaml")
	if err := os.WriteFile(profile, []byte(
		"name: slow\nsource: this test\nencode: {picture_ms: 1}\nprefill: {token_ms: 1}\ndecode: {step_ms: 1}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r.Stage.NPU.Pace = profile              // so that computing takes long, however fast the machine is
	r.Stage.OfferTimeout = 12 * time.Second // a quarter of it is what the other HMM has to answer
	has, _ := r.prefill(prefill.Config{})
	compute := func(i int, salt string) {
		t.Helper()
		spec := r.ending(i)
		spec.Salt = salt
		m := r.start(spec)
		if got, want := r.gateway.Tokens(m.Request.ID, 0, 1).IDs[0], r.Model.Answer(spec, 0).IDs[0]; got != want {
			t.Errorf("first token %d, want %d", got, want)
		}
		r.decodes(1)
		r.Empty(stage.Prefill)
		r.Done(m.Request.ID, -1)
	}
	compute(0, "")
	r.elsewhere()
	other, _ := r.prefill(prefill.Config{})
	for i := 1; r.Outcomes(other, "done") == 0; i++ { // so that it knows how long prompts take it
		compute(i, fmt.Sprint(i))
		r.idle(has, other)
	}
	r.Until("it is said what was done", func() bool { return r.Outcomes(other, "done") == 1 })
	for i := 1; r.Offers(other, "taken") < 2; i++ {
		if i > 50 {
			t.Fatal("the other node never offers anything")
		}
		compute(i, "")
		r.idle(has, other)
	}
	if n := r.Outcomes(other, "done"); n != 1 {
		t.Errorf("%d prompts were computed on the other node", n)
	}
	if r.Offers(has, "accepted") != r.Offers(other, "taken") {
		t.Errorf("%d offers accepted, %d taken", r.Offers(has, "accepted"), r.Offers(other, "taken"))
	}
	r.gateway.NothingLost()
}

// Instances that encode and compute prompts, each a memory domain: a prompt is computed where its picture was encoded, also if
// another one is idle and takes it from the queue.
func TestPromptsStayWhereTheirPictureWas(t *testing.T) {
	r := apart(t)
	var stages []*stage.Stage
	before := 0
	for range 2 {
		s, _ := r.Open(stage.Encode+wire.RoleSeparator+stage.Prefill, func(ctx context.Context, s *stage.Stage) error {
			return s.Serve(ctx, encoder.Role(), prefill.Role(prefill.Config{}))
		})
		slow(s)
		before += r.Copied(s, stage.Prefill)
		stages = append(stages, s)
	}
	c := &stagetest.Cases(t)[6]
	spec, mm := r.Model.Spec(c)
	if len(mm) != 1 {
		t.Fatalf("%d pictures", len(mm))
	}
	want := r.Model.Answer(spec, 0, mm...).IDs[0]
	for n := 0; r.Offers(stages[0], "taken")+r.Offers(stages[1], "taken") < 3; n++ {
		if n > 200 {
			t.Fatal("nothing is offered")
		}
		spec.Salt = fmt.Sprint(n) // nothing is cached
		m := wire.Prefill{Request: r.Request(r.gateway.ID), MM: make([]mem.Handle, 1)}
		m.Inline, m.Spec = r.Spec(m.Request, spec)
		join := &wire.Join{Prefill: m, Have: make([]bool, 1)}
		if err := r.Bus.CreateJoin(t.Context(), wire.JoinKey(m.Request.ID, 1), join); err != nil {
			t.Fatal(err)
		}
		r.Publish(stage.Encode, m.Request.ID, &wire.Encode{
			Request: m.Request, Pixels: r.Put(m.Request, mem.KindPixels, r.Model.Picture(c.Images[0])), Grid: c.Grids[0],
			Content: spec.Pictures[0].Content, Model: spec.Model, Salt: spec.Salt,
		})
		d := r.decodes(1)[m.Request.ID+"/0"]
		if got := r.token(r.open(d).log, 0); got != want {
			t.Errorf("first token %d, want %d", got, want)
		}
		r.Empty(stage.Encode)
		r.Empty(stage.Prefill)
		r.Done(m.Request.ID, -1)
		r.idle(stages...)
	}
	if n := r.Copied(stages[0], stage.Prefill) + r.Copied(stages[1], stage.Prefill) - before; n != 0 {
		t.Errorf("%d bytes were copied for prompts of one picture", n)
	}
	r.gateway.NothingLost()
}

// An instance that dies when it has accepted an offer is succeeded as one that has taken the message from the queue; its first
// taker does not come back to it by itself.
func TestAcceptorDies(t *testing.T) {
	r := apart(t)
	t.Setenv(childRows, "32")
	child := r.ProcessWith(stagetest.Slow) // what it accepts takes it seconds
	r.compute(r.ending(0))
	other, _ := r.prefill(prefill.Config{})
	slow(other)
	long := func(i int) *wire.Spec {
		s := r.ending(i)
		s.Prompt = append(s.Prompt, slices.Repeat(stagetest.Cases(t)[1].Input, 40)...)
		return s
	}
	var request string
	var spec *wire.Spec
	for i := 1; ; i++ {
		if i > 100 {
			t.Fatal("no offer was accepted")
		}
		spec = long(i)
		m := r.start(spec)
		request = m.Request.ID
		r.Until("somebody has it", func() bool { return r.Stats().Claims == 1 })
		if r.Offers(other, "taken") > 0 {
			break
		}
		r.Done(request, -1) // the child has taken it from the queue
		r.Empty(stage.Prefill)
	}
	child.KillAtWork(stage.Prefill)
	d := r.decodes(1)[request+"/0"]
	if got, want := r.token(r.open(d).log, 0), r.Model.Answer(spec, 0).IDs[0]; got != want {
		t.Errorf("first token %d, want %d", got, want)
	}
	if n := r.Outcomes(other, "done"); n != 1 {
		t.Errorf("the other one has computed %d prompts", n)
	}
	r.Empty(stage.Prefill)
	r.gateway.NothingLost()
}

// Instances that compute prompts and decode, each a memory domain: a sequence is decoded where its prompt was computed, also if
// another one is idle and takes it from the queue.
func TestSequencesStayWhereTheirPromptWas(t *testing.T) {
	r := apart(t)
	var stages []*stage.Stage
	for range 2 {
		s, _ := r.Open(stage.Prefill+wire.RoleSeparator+stage.Decode, func(ctx context.Context, s *stage.Stage) error {
			return s.Serve(ctx, prefill.Role(prefill.Config{}), decoder.Role(decoder.Config{}))
		})
		slow(s)
		stages = append(stages, s)
	}
	n := 0
	for ; r.Offers(stages[0], "taken")+r.Offers(stages[1], "taken") < 3; n++ {
		if n > 200 {
			t.Fatal("nothing is offered")
		}
		spec := r.ending(n)
		spec.Salt = string(rune('a' + n%2)) // beginnings on both
		m := r.start(spec)
		a := r.gateway.Ended(m.Request.ID, 0)
		if want := r.Model.Answer(spec, 0).IDs; !slices.Equal(a.IDs, want) {
			t.Errorf("answer %v, want %v", a.IDs, want)
		}
		r.Done(m.Request.ID, -1)
		r.idle(stages...)
	}
	copied := 0
	for _, s := range stages {
		copied += r.Copied(s, stage.Decode)
	}
	if copied != 0 {
		t.Errorf("%d bytes of KV were copied to decode %d idle instances' own prompts", copied, len(stages))
	}
	r.Empty(stage.Prefill)
	r.Empty(stage.Decode)
	r.gateway.NothingLost()
	r.NoMemory()
}
