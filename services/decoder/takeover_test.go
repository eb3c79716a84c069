package decoder_test

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"trireme.dev/services/decoder"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// committed is the number of tokens in a message's log.
func (r *rig) committed(m *wire.Decode) (n int) {
	r.Helper()
	r.withLog(m, func(log *kv.Log, _ []byte) { n = log.Committed() })
	return n
}

// A decoder whose claim is taken by a later one, as happens after AckWait, writes, publishes and acknowledges nothing
// more; whoever gets the message then goes on where the log ends, in memory of its own.
func TestFencedDecoderFallsSilent(t *testing.T) {
	r := newRig(t, stagetest.Short)
	s, _ := r.decoder(decoder.Config{})
	r.gateway.Deaf = true // so that the answer is not complete before the claim, however fast the decoder is
	spec := r.Model.Random(prompt(t, "case02"), 400, 1)
	req := r.Request(r.gateway.ID)
	m := r.Prefilled(req, spec, 0)
	r.first(&m, spec)
	r.Publish(stage.Decode, req.ID, &m)
	old := r.gateway.Tokens(req.ID, 0, 30).Runs[1].Generation

	claim, err := r.HBM.Claim(t.Context(), part(req, 0), "nowhere")
	if err != nil {
		t.Fatal(err)
	}
	if h, ok := claim.Log(); !ok || h.Object != m.Log.Object || h.Generation != m.Log.Generation {
		t.Errorf("the next claimant is told the log %+v, %v; it is %+v", h, ok, m.Log)
	}
	r.deaf(false)
	r.Until("it has noticed", func() bool { return r.Outcomes(s, "taken over") == 1 })
	o := r.Attach(mem.ReadWrite, m.Log)
	log, err := kv.OpenLog(o.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	before, fenced := bytes.Clone(o.Bytes()), log.Committed()
	if fenced >= 400 {
		t.Fatalf("the answer was complete, with %d tokens, before the decoder was fenced", fenced)
	}
	if _, taken := r.Queue(stage.Decode); taken != 1 {
		t.Errorf("a fenced decoder has settled the message: %d in work", taken)
	}
	r.decoder(decoder.Config{}) // a sibling, which may or may not be the one to get the message after AckWait
	got := r.gateway.Until("another claim goes on", req.ID, 0, func(a *stagetest.Answer) bool {
		return a.Runs[len(a.Runs)-1].Generation > old
	})
	if claim.Held() {
		t.Error("the later claim still holds")
	}
	at := slices.IndexFunc(got.Runs, func(run wire.Run) bool { return run.Generation > old })
	if first := got.Runs[at].Index; first != fenced {
		t.Errorf("the successor's first token is %d, the fenced decoder had committed %d", first, fenced)
	}
	got = r.gateway.Ended(req.ID, 0)
	for _, run := range got.Runs[at:] {
		if run.Generation <= old {
			t.Fatalf("run %+v of the fenced decoder came after the takeover", run)
		}
	}
	if !bytes.Equal(before, o.Bytes()) {
		t.Error("the log of the fenced decoder has changed after the takeover")
	}
	r.same(spec, 0, got)
	r.Free(o)
	r.end(req)
}

// Whatever a fenced writer still writes to the pages that it has mapped for writing, nobody reads it: here it spoils
// all of them as soon as another has taken over.
func TestFencedWriterReachesNobody(t *testing.T) {
	r := newRig(t, stagetest.Long)
	for _, choices := range []int{1, 2} {
		r.deaf(true) // so that the decoder waits in the middle
		_, stop := r.decoder(decoder.Config{})
		spec := r.Model.Random(prompt(t, "case02"), 600, choices)
		req := r.Request(r.gateway.ID)
		var messages []wire.Decode
		for c := range choices {
			m := r.Prefilled(req, spec, c)
			r.first(&m, spec)
			messages = append(messages, m)
			r.Publish(stage.Decode, req.ID, &m)
		}
		for c := range choices {
			r.gateway.Tokens(req.ID, c, 256) // one slab is full, another is not
		}
		stop()
		var theirs []*hbm.Object
		had := make([]int, choices)
		for c := range messages {
			theirs = append(theirs, r.written(&messages[c])...)
			had[c] = len(r.gateway.Answer(req.ID, c).IDs)
		}
		r.deaf(false)
		_, stop = r.decoder(decoder.Config{})
		for c := range choices {
			r.gateway.Tokens(req.ID, c, had[c]+10)
		}
		r.deaf(true)
		for _, o := range theirs {
			for i, b := range o.Bytes() {
				o.Bytes()[i] = b ^ 0xa5
			}
		}
		stop() // a second successor must find the first one's log
		r.deaf(false)
		_, stop = r.decoder(decoder.Config{})
		for c := range choices {
			r.same(spec, c, r.gateway.Ended(req.ID, c))
		}
		r.Free(theirs...)
		r.end(req)
		stop()
	}
}

// written maps what the first decoder of a message could write to and its successor does not share.
func (r *rig) written(m *wire.Decode) []*hbm.Object {
	r.Helper()
	objs := []*hbm.Object{r.Attach(mem.ReadWrite, m.Log)}
	log, err := kv.OpenLog(kv.Snapshot(objs[0].Bytes()))
	if err != nil {
		r.Fatal(err)
	}
	c, err := log.Continuation(kv.Known{}, func(mem.Handle) bool { return false })
	if err != nil {
		r.Fatal(err)
	}
	for n := range log.SlabCount() {
		if slices.Contains(c.Share, n) {
			continue
		}
		h, _, err := log.Slab(n)
		if err != nil {
			r.Fatal(err)
		}
		h.Node = m.Log.Node
		objs = append(objs, r.Attach(mem.ReadWrite, h))
	}
	if len(c.Share) == 0 || len(objs) == 1 {
		r.Fatalf("of %d slabs %d are shared: the test wants both kinds", log.SlabCount(), len(c.Share))
	}
	return objs
}

// A decoder process that is stopped for longer than AckWait and then goes on changes nothing: the answer is complete, the
// same, and nothing in it is the old writer's. What that one has mapped is not handed out again before it has let go.
func TestStoppedProcessChangesNothing(t *testing.T) {
	for name, resume := range map[string]func(*stagetest.Process){
		"goes on":   (*stagetest.Process).Continue,
		"is killed": (*stagetest.Process).Kill,
	} {
		t.Run("and "+name, func(t *testing.T) {
			r := newRig(t, stagetest.Short)
			process := r.Process()
			r.gateway.Deaf = true // so that the answer is not complete before the stop
			spec := r.Model.Random(prompt(t, "case01"), 400, 1)
			req := r.Request(r.gateway.ID)
			m := r.Prefilled(req, spec, 0)
			r.first(&m, spec)
			r.Publish(stage.Decode, req.ID, &m)
			old := r.gateway.Tokens(req.ID, 0, 60).Runs[1].Generation
			process.StopAtWork(stage.Decode)
			fenced := r.committed(&m)
			r.deaf(false)
			sibling, _ := r.decoder(decoder.Config{})
			successor := func(run wire.Run) bool { return run.Generation > old }
			r.gateway.Until("a sibling goes on", req.ID, 0, func(a *stagetest.Answer) bool {
				return slices.ContainsFunc(a.Runs, successor)
			})
			if name == "goes on" {
				process.Continue() // in the middle of the successor's work
			}
			got := r.gateway.Ended(req.ID, 0)
			r.same(spec, 0, got)
			for _, run := range got.Runs {
				if !successor(run) && run.Index > fenced { // what was on its way, or had passed the check, may still come
					t.Errorf("the old writer had committed %d tokens when it was stopped, and has sent token %d", fenced, run.Index)
				}
			}
			r.Empty(stage.Decode)
			r.Done(req.ID, -1)
			if name == "is killed" {
				r.Until("all but the stopped process have let go", func() bool {
					return r.Stats().Requests == 0 && r.Outcomes(sibling, "done") == 1
				})
				if s := r.Stats(); s.Objects-s.Resting < 2 {
					t.Errorf("the HMM has %d objects, the stopped process has a log and a slab mapped", s.Objects-s.Resting)
				}
			}
			resume(process)
			r.NoMemory()
			r.gateway.NothingLost()
		})
	}
}

// A decoder process that is killed is succeeded at once, by a sibling or by one that starts later; the answer goes on,
// bit for bit, from KV and log.
func TestKilledDecoderIsSucceeded(t *testing.T) {
	r := newRig(t, stagetest.Long)
	for name, late := range map[string]bool{"by a sibling": false, "by the next to start": true} {
		t.Run(name, func(t *testing.T) {
			process := r.Process()
			r.deaf(true) // so that no answer is complete before the kill
			spec := r.Model.Random(prompt(t, "case01"), 400, 2)
			req := r.start(spec)
			for c := range spec.Choices { // so that a sibling gets none of them before the kill
				r.gateway.Tokens(req.ID, c, 60)
			}
			stop := func() {}
			if !late {
				_, stop = r.decoder(decoder.Config{})
			}
			process.KillAtWork(stage.Decode)
			r.deaf(false)
			if late {
				_, stop = r.decoder(decoder.Config{})
			}
			for c := range spec.Choices {
				got := r.gateway.Ended(req.ID, c)
				r.same(spec, c, got)
				last := uint64(0)
				for i, run := range got.Runs {
					if run.Generation < last || i > 0 && run.Generation == 0 {
						t.Fatalf("run %d of generation %d after %d", i, run.Generation, last)
					}
					last = run.Generation
				}
				if first := got.Runs[1].Generation; last == first {
					t.Errorf("choice %d ended under its first claim: it was not taken over", c)
				}
				if first := got.Runs[0].Computed; first != 0 {
					t.Errorf("%d prompt tokens were computed again", first)
				}
			}
			r.end(req)
			stop()
		})
	}
}

// A decoder that is told to stop hands its sequences back at once, and a sibling continues them.
func TestStoppedDecoderHandsBack(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, stop := r.decoder(decoder.Config{})
	r.gateway.Deaf = true // so that no answer is complete before the stop
	spec := r.Model.Random(prompt(t, "case01"), 400, 3)
	req := r.start(spec)
	r.gateway.Tokens(req.ID, 2, 50)
	stop()
	r.deaf(false)
	if n := r.Outcomes(s, "handed back"); n != 3 {
		t.Errorf("%d messages handed back", n)
	}
	r.decoder(decoder.Config{})
	for c := range spec.Choices {
		r.same(spec, c, r.gateway.Ended(req.ID, c))
	}
	r.end(req)
}

// A done event in the middle frees what it names at once, and the message is gone.
func TestDoneFreesAtOnce(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, _ := r.decoder(decoder.Config{})
	r.gateway.Deaf = true // so that nothing but the event ends a choice
	spec := r.Model.Random(prompt(t, "case02"), 4000, 1)
	req := r.start(spec)
	r.gateway.Tokens(req.ID, 0, 20)
	r.Done(req.ID, -1)
	r.Until("it is settled", func() bool { return r.Outcomes(s, "ended") == 1 })
	r.end(req)

	// One choice of two: the other goes on to its end.
	spec = r.Model.Random(prompt(t, "case02"), 300, 2)
	req = r.start(spec)
	r.gateway.Tokens(req.ID, 0, 20)
	r.Done(req.ID, 0)
	r.Until("the ended choice is settled", func() bool { return r.Outcomes(s, "ended") == 2 })
	r.deaf(false)
	r.same(spec, 1, r.gateway.Ended(req.ID, 1))
	if a := r.gateway.Answer(req.ID, 0); a.Ended || len(a.IDs) == 300 {
		t.Errorf("the ended choice went on: %d tokens", len(a.IDs))
	}
	r.end(req)

	// The event comes before the message.
	req = r.Request(r.gateway.ID)
	m := r.Prefilled(req, spec, 0)
	r.Done(req.ID, 0)
	r.Until("the stage knows", func() bool { return s.Ended(req, 0) })
	r.Publish(stage.Decode, req.ID, &m)
	r.Until("the message is settled", func() bool { return r.Outcomes(s, "ended") == 3 })
	if a := r.gateway.Answer(req.ID, 0); len(a.Runs) > 0 {
		t.Errorf("%d runs of a choice that had ended", len(a.Runs))
	}
	r.end(req)
}

// A gateway that needs no more of a choice says so when it is asked.
func TestOverEndsTheChoice(t *testing.T) {
	r := newRig(t, stagetest.Long)
	r.decoder(decoder.Config{})
	r.gateway.Over = func(int) bool { return true }
	spec := r.Model.Greedy(prompt(t, "case02"), 4000)
	req := r.start(spec)
	r.gateway.Tokens(req.ID, 0, 20)
	r.Empty(stage.Decode)
	if n := len(r.gateway.Answer(req.ID, 0).IDs); n > 1000 {
		t.Errorf("%d tokens of a choice that was over at the first question", n)
	}
	r.end(req)
}

// Sequences of a gateway that is gone are given up, in the middle and at the end of their answer, and their memory is
// freed.
func TestGoneGatewayIsGivenUp(t *testing.T) {
	for name, tokens := range map[string]int{"in the middle": 4000, "at the end": 60} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, stagetest.Long)
			r.Stage.Lease = 200 * time.Millisecond
			s, _ := r.decoder(decoder.Config{})
			r.gateway.Leave()
			req := r.Request(r.gateway.ID)
			m := r.Prefilled(req, r.Model.Greedy(prompt(t, "case02"), tokens), 0)
			r.Publish(stage.Decode, req.ID, &m)
			r.Until("it is given up", func() bool { return r.Outcomes(s, "ended") == 1 })
			r.Empty(stage.Decode)
			r.NoMemory()
		})
	}
}

// Wrong bytes are never used: the gateway is told that the attempt is lost.
func TestWrongBytesLoseTheAttempt(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, _ := r.decoder(decoder.Config{})
	spec := r.Model.Greedy(prompt(t, "case01"), 40) // 28 positions: a sealed block and an open one
	flip := func(at func(header []byte) int) func(m *wire.Decode) {
		return func(m *wire.Decode) {
			o := r.Attach(mem.ReadWrite, m.Log)
			o.Bytes()[at(o.Bytes())] ^= 1
			r.Free(o)
		}
	}
	const slabs, blocks, records = 256, 256 + 3*64, 256 + 3*64 + 5*16 // see shared/kv: 1+2 slabs, 5 blocks of 68 positions
	n := 0
	for name, spoil := range map[string]func(m *wire.Decode){
		"header":        flip(func([]byte) int { return 20 }),
		"committed":     flip(func([]byte) int { return 88 + 1 }),
		"no token":      flip(func([]byte) int { return 88 }),
		"slab count":    flip(func([]byte) int { return 96 }),
		"block count":   flip(func([]byte) int { return 104 + 1 }),
		"slab entry":    flip(func([]byte) int { return slabs + 9 }),
		"block entry":   flip(func([]byte) int { return blocks + 6 }),
		"open block":    flip(func([]byte) int { return blocks + 16 }),
		"record":        flip(func([]byte) int { return records + 4 }),
		"sealed KV":     func(m *wire.Decode) { r.flipKV(m, 0) },
		"open KV":       func(m *wire.Decode) { r.flipKV(m, 1) },
		"other request": func(m *wire.Decode) { m.Log = r.other(spec, 0).Log },
		"other choice": func(m *wire.Decode) {
			req := m.Request
			*m = r.Prefilled(req, spec, 1)
			m.Choice = 0
		},
		"other kind": func(m *wire.Decode) {
			m.Log = r.Put(m.Request, mem.KindLog, bytes.Repeat([]byte{1}, 4096))
		},
		"capability": func(m *wire.Decode) {
			m.Log.Capability = slices.Clone(m.Log.Capability)
			m.Log.Capability[3] ^= 1
		},
		"generation": func(m *wire.Decode) { m.Log.Generation++ },
	} {
		n++
		req := r.Request(r.gateway.ID)
		m := r.Prefilled(req, spec, 0)
		spoil(&m)
		r.Publish(stage.Decode, req.ID, &m)
		lost := r.gateway.Lost(n)[n-1]
		if lost.Request != req.ID || lost.Attempt != 1 || lost.Final || lost.Why == "" {
			t.Errorf("%s: %+v", name, lost)
		}
		r.Empty(stage.Decode)
		if a := r.gateway.Answer(req.ID, 0); len(a.Runs) > 0 {
			t.Errorf("%s: %d runs", name, len(a.Runs))
		}
		r.Done(req.ID, -1)
	}
	if got := r.Outcomes(s, "lost"); got != n {
		t.Errorf("%d attempts lost of %d", got, n)
	}
	r.NoMemory()
}

// other is the decode message of another request with the same spec.
func (r *rig) other(spec *wire.Spec, choice int) wire.Decode {
	r.Helper()
	req := r.Request(r.gateway.ID)
	r.Cleanup(func() { r.Done(req.ID, -1) })
	m := r.Prefilled(req, spec, choice)
	r.Done(req.ID, -1)
	return m
}

// flipKV flips a bit of a block of a message's sequence.
func (r *rig) flipKV(m *wire.Decode, block int) {
	r.Helper()
	r.withLog(m, func(log *kv.Log, _ []byte) {
		ref, err := log.Block(block)
		if err != nil {
			r.Fatal(err)
		}
		h, _, err := log.Slab(ref.Slab)
		if err != nil {
			r.Fatal(err)
		}
		h.Node = m.Log.Node
		o := r.Attach(mem.ReadWrite, h)
		defer r.Free(o)
		o.Bytes()[ref.Block*r.Model.Config.Text.BlockFloats()*4+1000] ^= 4
	})
}

// A request for another model, or one that no attempt could serve, is final; what is no message at all is dropped.
func TestFaultsAreFinal(t *testing.T) {
	r := newRig(t, stagetest.Long)
	r.decoder(decoder.Config{})
	spec := r.Model.Greedy(prompt(t, "case01"), 40)
	spec.Model[0] ^= 1
	req := r.start(spec)
	lost := r.gateway.Lost(1)[0]
	if lost.Request != req.ID || !lost.Final || lost.Status != 500 {
		t.Errorf("another model: %+v", lost)
	}
	if err := r.Bus.Conn().Publish(wire.StageSubject(stage.Decode, "x"), []byte("no message")); err != nil {
		t.Fatal(err)
	}
	r.Until("the stream is empty", func() bool { waiting, taken := r.Queue(stage.Decode); return waiting+taken == 0 })
	r.Done(req.ID, -1)
	r.NoMemory()
}

// A decoder without room hands the message back until there is some, and a sequence that needs a slab waits for it.
func TestRoomIsWaitedFor(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, _ := r.decoder(decoder.Config{})
	full := r.fill(s)
	spec := r.slabs()
	r.gateway.Deaf = true
	req := r.start(spec)
	r.Until("it was handed back", func() bool { return r.Outcomes(s, "no memory") > 0 })
	r.drain(s, full)
	full = r.fillBeforeThird(s, req, spec)
	r.drain(s, full)
	r.same(spec, 0, r.gateway.Ended(req.ID, 0))
	r.end(req)
}

// slabs is a request that needs three slabs: its answer reaches the third one after it has had to be confirmed once.
func (r *rig) slabs() *wire.Spec {
	r.Helper()
	return r.Model.Greedy(prompt(r.T, "case01"), 600) // 628 positions
}

// fillBeforeThird takes all that a decoder's NPU has left while a request of slabs is parked in its second one, and returns
// when the request waits for its third. The gateway has to be deaf before.
func (r *rig) fillBeforeThird(s *stage.Stage, req wire.Request, spec *wire.Spec) *hbm.Object {
	r.Helper()
	r.gateway.Tokens(req.ID, 0, 256)
	full := r.fill(s)
	r.deaf(false)
	at := 2*256 - len(spec.Prompt) + 1 // tokens that two slabs have room for, and the one behind
	r.gateway.Until("it waits for a slab", req.ID, 0, func(a *stagetest.Answer) bool { return len(a.IDs) >= at })
	if n := len(r.gateway.Answer(req.ID, 0).IDs); n != at {
		r.Errorf("%d tokens without a third slab, want %d", n, at)
	}
	return full
}

// fill takes all that a decoder's NPU has left, and drain gives it back.
func (r *rig) fill(s *stage.Stage) *hbm.Object {
	r.Helper()
	var free int64
	for _, n := range r.Stats().Memory {
		if n.NPU == s.NPUs()[0].Number {
			free = n.Free
		}
	}
	objs, err := s.HBM.Alloc(r.Context(), hbm.Spec{Kind: mem.KindKV, NPU: s.NPUs()[0].Number, Bytes: free})
	if err != nil {
		r.Fatal(err)
	}
	return objs[0]
}

func (r *rig) drain(s *stage.Stage, o *hbm.Object) {
	r.Helper()
	if err := s.HBM.Free(r.Context(), o); err != nil {
		r.Fatal(err)
	}
}

// A sequence that finds no room to begin while another waits for a slab makes way at once: what it shares may be what the
// other lacks.
func TestNewcomerMakesWay(t *testing.T) {
	r := newRig(t, stagetest.Long)
	s, _ := r.decoder(decoder.Config{})
	spec := r.slabs()
	r.gateway.Deaf = true
	req := r.start(spec)
	full := r.fillBeforeThird(s, req, spec)
	other := r.start(spec)
	if lost := r.gateway.Lost(1)[0]; lost.Request != other.ID || !lost.NoRoom {
		t.Errorf("the newcomer: %+v", lost)
	}
	r.Done(other.ID, -1)
	r.drain(s, full)
	r.same(spec, 0, r.gateway.Ended(req.ID, 0))
	r.Empty(stage.Decode)
	r.Done(req.ID, -1)
	r.NoMemory()
}
