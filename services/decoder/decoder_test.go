package decoder_test

import (
	"context"
	"log/slog"
	"math"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/decoder"
	"trireme.dev/services/hmm"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/leaktest"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

func TestMain(m *testing.M) {
	stagetest.Child(stage.Decode, func(ctx context.Context, s *stage.Stage) error {
		if len(s.NPUs()) == 2 {
			go shuttle(ctx, s, new(atomic.Int64))
		}
		return decoder.Serve(ctx, s, decoder.Config{})
	})
	leaktest.VerifyTestMain(m)
}

// npuBytes is the memory of each NPU in tests.
const npuBytes = 32 << 20

func serveHMM(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
	return hmm.Run(ctx, hmm.Config{Socket: socket, Node: "n", NPUs: 4, NPUBytes: npuBytes, HostBytes: 16 << 20, NATS: conn}, log)
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

// deaf lets the gateway answer no question, or answer again. A sequence of a deaf gateway stops where it has to be confirmed:
// it does not end before the test has done what it has to do meanwhile.
func (r *rig) deaf(d bool) { r.gateway.Set(func() { r.gateway.Deaf = d }) }

// decoder starts a decoder.
func (r *rig) decoder(cfg decoder.Config) (*stage.Stage, func()) {
	r.Helper()
	return r.Open(stage.Decode, func(ctx context.Context, s *stage.Stage) error { return decoder.Serve(ctx, s, cfg) })
}

// start publishes the decode messages of a request, as a prefill does that has computed it, and sends the first tokens.
func (r *rig) start(spec *wire.Spec) wire.Request {
	r.Helper()
	req := r.Request(r.gateway.ID)
	for c := range spec.Choices {
		m := r.Prefilled(req, spec, c)
		r.first(&m, spec)
		r.Publish(stage.Decode, req.ID, &m)
	}
	return req
}

// first sends the first token of a choice to the gateway, from its log.
func (r *rig) first(m *wire.Decode, spec *wire.Spec) {
	r.Helper()
	r.withLog(m, func(log *kv.Log, _ []byte) {
		runs, err := stage.Replay(log, &spec.Sampling, 0, 0)
		if err != nil {
			r.Fatal(err)
		}
		if err := stage.SendTokens(r.Bus, "prefill", r.gateway.ID, runs); err != nil {
			r.Fatal(err)
		}
	})
}

// withLog opens a message's token log in the test's own map for the length of f.
func (r *rig) withLog(m *wire.Decode, f func(log *kv.Log, bytes []byte)) {
	r.Helper()
	o := r.Attach(mem.ReadWrite, m.Log)
	defer r.Free(o)
	log, err := kv.OpenLog(o.Bytes())
	if err != nil {
		r.Fatal(err)
	}
	f(log, o.Bytes())
}

// same checks a complete answer against the one that the request gets alone.
func (r *rig) same(spec *wire.Spec, choice int, got stagetest.Answer) {
	r.Helper()
	want := r.Model.Answer(spec, choice)
	if !slices.Equal(got.IDs, want.IDs) || got.Finish != want.Finish {
		r.Errorf("choice %d: %d tokens, finish %d: %v\nalone %d tokens, finish %d: %v", choice,
			len(got.IDs), got.Finish, got.IDs, len(want.IDs), want.Finish, want.IDs)
	}
	if len(got.Logprobs) != len(want.Logprobs) {
		r.Fatalf("choice %d: %d log probabilities, alone %d", choice, len(got.Logprobs), len(want.Logprobs))
	}
	for i, w := range want.Logprobs {
		g := got.Logprobs[i]
		if math.Float32bits(g.Own) != math.Float32bits(w.Own) || !slices.Equal(g.IDs, w.IDs) || !slices.Equal(g.Top, w.Top) {
			r.Fatalf("choice %d: token %d has log probabilities %+v, alone %+v", choice, i, g, w)
		}
	}
}

// end ends a request whose answers are complete, as its gateway does, and checks that nothing is left of it.
func (r *rig) end(req wire.Request) {
	r.Helper()
	r.Empty(stage.Decode)
	r.Done(req.ID, -1)
	r.NoMemory()
	r.gateway.NothingLost()
}

// part is the claim of a choice.
func part(req wire.Request, choice int) hbm.Part {
	return hbm.Part{Request: req.ID, Attempt: req.Attempt, Stage: stage.Decode, Part: choice, Left: req.Left}
}

func prompt(t *testing.T, name string) []int32 {
	t.Helper()
	for _, c := range stagetest.Cases(t) {
		if c.Name == name {
			return c.Input
		}
	}
	t.Fatalf("no case %s", name)
	return nil
}

// Tokens come numbered, one a step, under the claim's generation, and the end is confirmed; also over several slabs.
func TestTokensAreNumbered(t *testing.T) {
	r := newRig(t, stagetest.Long)
	r.decoder(decoder.Config{})
	long := r.Model.Random(prompt(t, "case01"), 560, 2) // 588 positions, 3 slabs
	golden := stagetest.Cases(t)[1]
	short := r.Model.Greedy(golden.Input, 320)
	short.Sampling.Stop = []int32{621, 619}
	a, b := r.start(long), r.start(short)
	for c := range long.Choices {
		got := r.gateway.Ended(a.ID, c)
		r.same(long, c, got)
		next, generation := 1, got.Runs[1].Generation
		for _, run := range got.Runs[1:] {
			if run.Index < next { // sent again, as the gateway was asked before the last tokens had arrived
				continue
			}
			if run.Index != next || len(run.IDs) != 1 || run.Generation != generation || generation == 0 || run.Attempt != 1 {
				t.Fatalf("run %+v, want index %d, generation %d", run, next, generation)
			}
			next++
		}
	}
	got := r.gateway.Ended(b.ID, 0)
	r.same(short, 0, got)
	if !slices.Equal(got.IDs, golden.Output) || got.Finish != wire.FinishStop {
		t.Errorf("golden answer: %v, finish %d", got.IDs, got.Finish)
	}
	r.Done(b.ID, -1)
	r.end(a)
}

// An answer that prefill has already completed needs its end confirmed and nothing else.
func TestFirstTokenIsTheLast(t *testing.T) {
	r := newRig(t, stagetest.Long)
	r.decoder(decoder.Config{})
	one := r.Model.Greedy(prompt(t, "case00"), 1)
	stop := r.Model.Greedy(prompt(t, "case00"), 100)
	stop.Sampling.Stop = r.Model.Answer(one, 0).IDs
	for _, spec := range []*wire.Spec{one, stop} {
		req := r.start(spec)
		r.same(spec, 0, r.gateway.Ended(req.ID, 0))
		r.end(req)
	}
	// The message with the first token is lost: the decoder has it in the log.
	req := r.Request(r.gateway.ID)
	m := r.Prefilled(req, stop, 0)
	r.Publish(stage.Decode, req.ID, &m)
	r.same(stop, 0, r.gateway.Ended(req.ID, 0))
	r.end(req)
}

// More sequences than slots, joining and leaving at any step: each answer is the one that it gets alone.
func TestSequencesShareBatches(t *testing.T) {
	r := newRig(t, stagetest.Long)
	r.decoder(decoder.Config{Slots: 4})
	cases := stagetest.Cases(t)
	type started struct {
		spec *wire.Spec
		req  wire.Request
	}
	var all []started
	for i, name := range []int{0, 1, 2, 5, 10} {
		for _, spec := range []*wire.Spec{r.Model.Greedy(cases[name].Input, 20+7*i), r.Model.Random(cases[name].Input, 45-5*i, 2)} {
			all = append(all, started{spec, r.start(spec)})
		}
	}
	for _, s := range all {
		for c := range s.spec.Choices {
			r.same(s.spec, c, r.gateway.Ended(s.req.ID, c))
		}
	}
	for _, s := range all[1:] {
		r.Done(s.req.ID, -1)
	}
	r.end(all[0].req)
}

// A sequence runs 256 tokens ahead of what its gateway has confirmed, then it waits, and goes on when it is answered.
func TestParksWithoutConfirmation(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, _ := r.decoder(decoder.Config{})
	r.gateway.Deaf = true
	spec := r.Model.Greedy(prompt(t, "case01"), 600)
	req := r.start(spec)
	r.gateway.Tokens(req.ID, 0, 256)
	// Others go on, many steps.
	other := r.Gateway()
	beside := r.Model.Greedy(prompt(t, "case00"), 100)
	reqBeside := r.Request(other.ID)
	m := r.Prefilled(reqBeside, beside, 0)
	r.Publish(stage.Decode, reqBeside.ID, &m)
	r.same(beside, 0, other.Ended(reqBeside.ID, 0))
	a := r.gateway.Until("it is asked", req.ID, 0, func(a *stagetest.Answer) bool { return a.Confirms > 0 })
	if len(a.IDs) != 256 {
		t.Errorf("%d tokens without a confirmation", len(a.IDs))
	}
	r.Until("the other is settled, and it alone", func() bool {
		_, taken := r.Queue(stage.Decode)
		return taken == 1 && r.Outcomes(s, "done") == 1
	})
	r.deaf(false)
	r.same(spec, 0, r.gateway.Ended(req.ID, 0))
	r.Done(reqBeside.ID, -1)
	r.end(req)
}

// Tokens that are lost on their way come again from the log, with their log probabilities: asked for by the gateway, or
// found by the decoder's own question.
func TestLostTokensComeAgain(t *testing.T) {
	r := newRig(t, stagetest.Long)
	r.decoder(decoder.Config{})
	spec := r.Model.Random(prompt(t, "case02"), 300, 1)
	once := func(lost func(int) bool) func(*wire.Run) bool {
		seen := map[int]bool{}
		return func(run *wire.Run) bool {
			lose := !seen[run.Index] && lost(run.Index)
			seen[run.Index] = true
			return lose
		}
	}
	for name, x := range map[string]struct {
		quiet bool
		lost  func(index int) bool
	}{
		"the gateway asks":  {false, func(i int) bool { return i == 0 || i >= 40 && i < 60 || i == 100 }},
		"the decoder finds": {true, func(i int) bool { return i >= 3 && i < 9 }},
		"the last token":    {true, func(i int) bool { return i == 299 }},
		"nearly all":        {true, func(i int) bool { return i%50 != 0 }},
	} {
		t.Run(name, func(t *testing.T) {
			r.gateway.Set(func() { r.gateway.Quiet, r.gateway.Lose = x.quiet, once(x.lost) })
			req := r.start(spec)
			r.same(spec, 0, r.gateway.Ended(req.ID, 0))
			r.end(req)
		})
	}
}

// The message is acknowledged once the gateway has confirmed the end, not before.
func TestEndIsConfirmedBeforeTheAck(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, _ := r.decoder(decoder.Config{})
	r.gateway.Deaf = true
	spec := r.Model.Greedy(prompt(t, "case00"), 40)
	req := r.start(spec)
	r.gateway.Until("the end is told and asked for", req.ID, 0, func(a *stagetest.Answer) bool {
		return len(a.IDs) == 40 && a.Confirms > 0
	})
	if _, taken := r.Queue(stage.Decode); taken != 1 || r.Outcomes(s, "done") != 0 {
		t.Errorf("before the confirmation %d messages are in work, %d done", taken, r.Outcomes(s, "done"))
	}
	r.deaf(false)
	r.same(spec, 0, r.gateway.Ended(req.ID, 0))
	r.end(req)
}

// A message may come of a request that its gateway has no more, to an HMM that has started since its end. Nothing is left of it
// there: neither when its KV is gone, nor when all of it is as it was.
func TestMessageOfAnEndedRequest(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, _ := r.decoder(decoder.Config{})
	r.gateway.Set(func() { r.gateway.Without = true })
	none := func() bool { return r.Stats().Requests == 0 }
	gone := r.Request(r.gateway.ID)
	spec, err := wire.MarshalSpec(r.Model.Random(prompt(t, "case02"), 10, 1))
	if err != nil {
		t.Fatal(err)
	}
	r.Publish(stage.Decode, gone.ID, &wire.Decode{Request: gone, Inline: spec, Log: mem.Handle{Node: "n", Object: 1 << 40, Generation: 1, Kind: mem.KindLog, Bytes: 1}})
	r.Until("the message is settled", func() bool { return r.Outcomes(s, "lost") == 1 })
	r.Until("nothing is left of a request whose KV is gone", none)
	r.start(r.Model.Random(prompt(t, "case02"), 300, 1))
	r.Until("nothing is left of a request that was as before", none)
	r.Empty(stage.Decode)
	r.NoMemory()
}
