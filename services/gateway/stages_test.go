package gateway_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"image"
	_ "image/png"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"trireme.dev/services/gateway"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

// stages speaks for an encoder, a prefill and a decoder: real messages over a real bus, made-up tokens.
type stages struct {
	t      *testing.T
	bus    *bus.Bus
	memory *memory
	model  *gateway.Model

	// answer gives all ids of a choice, the stop id included. Called by prefill and decoder, so it must be repeatable.
	answer func(q question) []int32
	// prefill and decode, if set, take a message over; they return false to leave it to the usual behaviour.
	prefill func(m *wire.Prefill, q question) bool
	decode  func(m *wire.Decode, q question) bool
	lose    func(r *wire.Run) bool // a run that it wants is not sent
	each    int                    // tokens in a run of the decoder

	mu      sync.Mutex
	encodes []wire.Encode
	asked   []question
	logs    map[part][]int32
	done    map[part]bool
	resends []wire.Resend
	changed chan struct{}
	largest int              // bytes of the largest message seen on the bus
	npus    map[string][]int // by role; one without any stands by
}

type part struct {
	request string
	choice  int
}

// question is what a stage knows of a choice.
type question struct {
	wire.Request
	Choice int
	Spec   *wire.Spec
	Text   string // of the prompt
}

const eos = 621 // <|im_end|>

func startStages(t *testing.T, url string, m *memory, model *gateway.Model) *stages {
	b, err := bus.Connect(t.Context(), url, "stages", quiet())
	if err != nil {
		t.Fatal(err)
	}
	s := &stages{t: t, bus: b, memory: m, model: model, each: 1, logs: map[part][]int32{}, done: map[part]bool{}, changed: make(chan struct{})}
	s.npus = map[string][]int{"encode": {0}, "prefill": {1}, "decode": {2}}
	s.answer = func(q question) []int32 { return append(s.ids("Hello, world!"), eos) }
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		b.Close()
	})
	handle := func(subject string, f func(data []byte)) {
		if _, err := b.Handle(subject, func(data []byte, _ func(any) error) { f(data) }); err != nil {
			t.Fatal(err)
		}
	}
	handle(wire.SubjectDone, func(data []byte) {
		var m wire.Done
		if s.unmarshal(data, &m) {
			if m.Attempt == 0 { // later ones go on
				s.note(func() { s.done[part{m.Request, m.Choice}] = true })
			}
		}
	})
	handle(wire.SubjectResend("stages"), func(data []byte) {
		var m wire.Resend
		if !s.unmarshal(data, &m) {
			return
		}
		var r *wire.Run
		s.note(func() {
			s.resends = append(s.resends, m)
			if log := s.logs[part{m.Request, m.Choice}]; len(log) > m.From {
				r = &wire.Run{Request: m.Request, Choice: m.Choice, Index: m.From, IDs: log[m.From:], Generation: 5}
				for _, q := range s.asked {
					if q.ID == m.Request {
						r.Attempt = q.Attempt
					}
				}
			}
		})
		if r != nil {
			s.sendTo(m.Request, r)
		}
	})
	handle(">", func(data []byte) { s.note(func() { s.largest = max(s.largest, len(data)) }) })
	for stage, f := range map[string]func(context.Context, []byte){"encode": s.onEncode, "prefill": s.onPrefill, "decode": s.onDecode} {
		c, err := b.Consumer(t.Context(), stage)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for ctx.Err() == nil {
				batch, err := c.Next(ctx, 64, time.Second)
				if err != nil && ctx.Err() == nil {
					time.Sleep(10 * time.Millisecond) // the server is away
				}
				for _, d := range batch {
					wg.Go(func() {
						f(ctx, d.Data)
						_ = d.Ack(ctx)
					})
				}
			}
		})
	}
	for _, role := range []string{"encode", "prefill", "decode"} {
		wg.Go(func() {
			_ = b.Announce(ctx, func() wire.Instance {
				s.mu.Lock()
				defer s.mu.Unlock()
				return wire.Instance{
					ID: "stages-" + role, Role: role, Ready: true, Digest: fmt.Sprintf("%x", model.Config.Digest),
					NPUs: s.npus[role], Standby: len(s.npus[role]) == 0,
				}
			})
		})
	}
	return s
}

func (s *stages) unmarshal(data []byte, m any) bool {
	err := wire.Unmarshal(data, m)
	if err != nil {
		s.t.Errorf("a message of the gateway: %v", err)
	}
	return err == nil
}

func (s *stages) note(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
}

// await waits until what f looks at is so.
func (s *stages) await(what string, f func() bool) {
	s.t.Helper()
	deadline := time.After(time.Minute)
	// f may ask the gateway, which may not answer: then all goroutines say where they are.
	stuck := time.AfterFunc(2*time.Minute, func() { panic(fmt.Sprintf("%s: %s: what is looked at does not answer", s.t.Name(), what)) })
	defer stuck.Stop()
	for {
		s.mu.Lock()
		ok, changed := f(), s.changed
		s.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-time.After(5 * time.Millisecond): // for what is not the stages' own
		case <-deadline:
			s.t.Fatalf("%s: never", what)
		}
	}
}

func (s *stages) isDone(request string, choice int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done[part{request, -1}] || s.done[part{request, choice}]
}

// ids cuts text into tokens.
func (s *stages) ids(text string) []int32 {
	ids, err := s.model.Tokenizer.Encode(text)
	if err != nil {
		s.t.Error(err)
	}
	out := make([]int32, len(ids))
	for i, id := range ids {
		out[i] = int32(id)
	}
	return out
}

func (s *stages) text(ids []int32) string {
	all := make([]int, len(ids))
	for i, id := range ids {
		all[i] = int(id)
	}
	return s.model.Tokenizer.Decode(all, false)
}

func (s *stages) onEncode(ctx context.Context, data []byte) {
	var m wire.Encode
	if !s.unmarshal(data, &m) {
		return
	}
	s.note(func() { s.encodes = append(s.encodes, m) })
	pixels, err := s.memory.get(m.Pixels)
	if err == nil {
		if _, _, derr := image.Decode(bytes.NewReader(pixels)); derr != nil {
			_ = s.bus.Send(wire.SubjectLost(m.Request.Gateway), &wire.Lost{Request: m.Request.ID, Attempt: m.Request.Attempt,
				Why: "the picture is damaged", Final: true, Status: 400, Param: wire.PictureParam(m.Part)})
			return
		}
	}
	if err != nil {
		s.lostAttempt(m.Request, err.Error())
		return
	}
	mm := mem.Handle{Node: "node", Object: 1000 + uint64(m.Part), Kind: mem.KindMM, Shape: []int{4, 1, 256}, Capability: make([]byte, 16)}
	j, err := s.bus.MarkJoin(ctx, wire.JoinKey(m.Request.ID, m.Request.Attempt), m.Part, mm, false)
	if err != nil {
		return // the request has ended
	}
	if j.Complete() {
		_ = s.bus.Publish(ctx, "prefill", m.Request.ID, fmt.Sprintf("%s.%d.p", m.Request.ID, m.Request.Attempt), &j.Prefill)
	}
}

func (s *stages) lostAttempt(r wire.Request, why string) {
	_ = s.bus.Send(wire.SubjectLost(r.Gateway), &wire.Lost{Request: r.ID, Attempt: r.Attempt, Why: why})
}

func (s *stages) spec(inline []byte, handle *mem.Handle) (*wire.Spec, error) {
	if handle != nil {
		var err error
		if inline, err = s.memory.get(*handle); err != nil {
			return nil, err
		}
	}
	spec := new(wire.Spec)
	return spec, wire.Unmarshal(inline, spec)
}

func (s *stages) onPrefill(ctx context.Context, data []byte) {
	var m wire.Prefill
	if !s.unmarshal(data, &m) {
		return
	}
	spec, err := s.spec(m.Inline, m.Spec)
	if err != nil {
		s.lostAttempt(m.Request, err.Error())
		return
	}
	q := question{Request: m.Request, Spec: spec, Text: s.text(spec.Prompt)}
	s.note(func() { s.asked = append(s.asked, q) })
	if s.prefill != nil && s.prefill(&m, q) {
		return
	}
	if len(m.MM) != len(spec.Pictures) {
		s.t.Errorf("prefill got %d MM objects for %d pictures", len(m.MM), len(spec.Pictures))
	}
	for c := range spec.Choices {
		q.Choice = c
		ids := s.all(q)
		at := 0
		if spec.Resume != nil {
			at = len(spec.Resume[c])
		}
		if at >= len(ids) || s.isDone(m.Request.ID, c) {
			continue
		}
		s.note(func() { s.logs[part{m.Request.ID, c}] = ids[:at+1] })
		r := s.run(q, ids, at, at+1)
		if r.Generation = 0; c == 0 {
			r.Cached = min(3, len(spec.Prompt)-1)
			r.Computed = len(spec.Prompt) - r.Cached
		}
		s.send(m.Request.Gateway, r)
		d := wire.Decode{Request: m.Request, Choice: c, Inline: m.Inline, Spec: m.Spec}
		if err := s.bus.Publish(ctx, "decode", m.Request.ID, fmt.Sprintf("%s.%d.d.%d", m.Request.ID, m.Request.Attempt, c), &d); err != nil {
			return
		}
	}
}

// all is the answer cut to what the request allows.
func (s *stages) all(q question) []int32 {
	ids := s.answer(q)
	return ids[:min(len(ids), q.Spec.Sampling.MaxTokens)]
}

// run makes the run of ids[from:to].
func (s *stages) run(q question, ids []int32, from, to int) *wire.Run {
	r := &wire.Run{Request: q.ID, Attempt: q.Attempt, Choice: q.Choice, Generation: 5, Index: from, IDs: ids[from:to]}
	if n := q.Spec.Sampling.Logprobs; n >= 0 {
		for i := from; i < to; i++ {
			lp := wire.Logprob{Own: -0.25}
			for k := range n {
				lp.IDs, lp.Top = append(lp.IDs, int32(10+k)), append(lp.Top, -1-float32(k))
			}
			r.Logprobs = append(r.Logprobs, lp)
		}
	}
	if to == len(ids) {
		r.Finish = finish(q, ids)
	}
	return r
}

func finish(q question, ids []int32) wire.Finish {
	for _, id := range q.Spec.Sampling.Stop {
		if ids[len(ids)-1] == id {
			return wire.FinishStop
		}
	}
	return wire.FinishLength
}

func (s *stages) send(gateway string, r *wire.Run) {
	if s.lose != nil && s.lose(r) {
		return
	}
	_ = s.bus.Send(wire.SubjectTokens(gateway), &wire.Tokens{Instance: "stages", Items: []wire.Run{*r}})
}

// raw sends commands of NATS' protocol on a connection of their own, as fast as the kernel takes them, and returns once the server has had them.
func (s *stages) raw(commands []byte) error {
	conn, err := net.Dial("tcp", s.bus.Conn().ConnectedAddr())
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	told := bufio.NewReader(conn)
	if _, err := told.ReadString('\n'); err != nil { // INFO
		return err
	}
	if _, err := conn.Write(slices.Concat([]byte("CONNECT {\"verbose\":false}\r\n"), commands, []byte("PING\r\n"))); err != nil {
		return err
	}
	for {
		line, err := told.ReadString('\n')
		switch {
		case err != nil:
			return err
		case strings.HasPrefix(line, "PONG"):
			return nil
		case strings.HasPrefix(line, "-ERR"):
			return errors.New(strings.TrimSpace(line))
		}
	}
}

func (s *stages) sendTo(request string, r *wire.Run) {
	s.mu.Lock()
	gateway := ""
	for _, q := range s.asked {
		if q.ID == request {
			gateway = q.Gateway
		}
	}
	s.mu.Unlock()
	s.send(gateway, r)
}

func (s *stages) onDecode(ctx context.Context, data []byte) {
	var m wire.Decode
	if !s.unmarshal(data, &m) {
		return
	}
	spec, err := s.spec(m.Inline, m.Spec)
	if err != nil {
		s.lostAttempt(m.Request, err.Error())
		return
	}
	q := question{Request: m.Request, Choice: m.Choice, Spec: spec, Text: s.text(spec.Prompt)}
	if s.decode != nil && s.decode(&m, q) {
		return
	}
	s.decodeAll(ctx, q)
}

// decodeAll sends what is left of a choice and sees to it that the gateway has it.
func (s *stages) decodeAll(ctx context.Context, q question) {
	ids := s.all(q)
	at := 1
	if q.Spec.Resume != nil {
		at += len(q.Spec.Resume[q.Choice])
	}
	for at < len(ids) && ctx.Err() == nil && !s.isDone(q.ID, q.Choice) {
		to := min(at+s.each, len(ids))
		s.note(func() { s.logs[part{q.ID, q.Choice}] = ids[:to] })
		s.send(q.Gateway, s.run(q, ids, at, to))
		at = to
		if at%64 == 0 && !s.confirmed(ctx, q, ids, at) {
			return
		}
	}
	if at >= len(ids) {
		s.confirmed(ctx, q, ids, len(ids))
	}
}

// confirmed asks the gateway until it has every token before at; false when it needs no more.
func (s *stages) confirmed(ctx context.Context, q question, ids []int32, at int) bool {
	for ctx.Err() == nil && !s.isDone(q.ID, q.Choice) {
		c := wire.Confirm{Instance: "stages", Request: q.ID, Attempt: q.Attempt, Choice: q.Choice, Generation: 5, Next: at}
		if at == len(ids) {
			c.Finish = finish(q, ids)
		}
		once, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		var a wire.Confirmed
		err := s.bus.Ask(once, wire.SubjectConfirm(q.Gateway), &c, &a)
		cancel()
		switch {
		case err != nil:
			time.Sleep(5 * time.Millisecond)
		case a.Over:
			return false
		case a.Next >= at:
			return true
		default:
			s.send(q.Gateway, s.run(q, ids, a.Next, at))
		}
	}
	return false
}
