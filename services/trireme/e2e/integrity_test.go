package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/openai/openai-go/v3"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// rogue is a party that has access to everything that a stage has, and does harm with it: it changes memory through a
// mapping that no rule of the HMM holds back, and messages on the bus.
type rogue struct {
	testing.TB
	c      *cluster
	client *hbm.Client
	conn   *nats.Conn
	js     jetstream.JetStream

	held uint64 // number of the last message in the queue that was held last, when that began

	subs []*nats.Subscription // to messages to stages
	mu   sync.Mutex
	seen []*nats.Msg // all of these, in order
}

func newRogue(tb testing.TB, c *cluster) *rogue {
	tb.Helper()
	r := &rogue{TB: tb, c: c}
	var err error
	if r.conn, err = nats.Connect(c.nats); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(r.conn.Close)
	if r.js, err = jetstream.New(r.conn); err != nil {
		tb.Fatal(err)
	}
	for _, role := range []string{stage.Encode, stage.Prefill, stage.Decode} {
		sub, err := r.conn.Subscribe(wire.StageSubjects(role), func(m *nats.Msg) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.seen = append(r.seen, m)
		})
		if err != nil {
			tb.Fatal(err)
		}
		r.subs = append(r.subs, sub)
	}
	if r.client, err = hbm.Dial(tb.Context(), filepath.Join(c.data, "hmm.sock"), hbm.Hello{Instance: "rogue", Role: "rogue"}); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { r.client.Close() })
	return r
}

func (r *rogue) must(err error) {
	if err != nil {
		r.Helper()
		r.Fatal(err)
	}
}

func (r *rogue) attach(h mem.Handle) *hbm.Object {
	r.Helper()
	objs, err := r.client.Attach(r.Context(), mem.ReadOnly, -1, h)
	r.must(err)
	return objs[0]
}

func (r *rogue) free(o *hbm.Object) { r.must(r.client.Free(r.Context(), o)) }

// flip changes one bit of an object, sealed or not, behind the back of the HMM: in the file that it lies in.
func (r *rogue) flip(h mem.Handle, at int) {
	r.Helper()
	o := r.attach(h)
	defer r.free(o)
	page, ok := backing(r, os.Getpid(), uintptr(unsafe.Pointer(&o.Bytes()[at])))
	if !ok {
		r.Fatal("an object is in no file")
	}
	fds, err := os.ReadDir("/proc/self/fd")
	r.must(err)
	for _, fd := range fds {
		path := "/proc/self/fd/" + fd.Name()
		var stat syscall.Stat_t
		if syscall.Stat(path, &stat) != nil || stat.Ino != page.inode {
			continue
		}
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		r.must(err)
		defer f.Close()
		old := o.Bytes()[at]
		_, err = f.WriteAt([]byte{old ^ 4}, int64(page.offset))
		r.must(err)
		if o.Bytes()[at] != old^4 {
			r.Fatal("the object has not changed")
		}
		return
	}
	r.Fatal("no descriptor of the object's file")
}

// log reads a sequence's token log and hands out its slabs.
func (r *rogue) log(d *wire.Decode, look func(log *kv.Log, slab func(i int) mem.Handle)) {
	r.Helper()
	o := r.attach(d.Log)
	defer r.free(o)
	log, err := kv.OpenLog(o.Bytes())
	r.must(err)
	look(log, func(i int) mem.Handle {
		h, _, err := log.Slab(i)
		r.must(err)
		h.Node = d.Log.Node
		return h
	})
}

// flipKV flips a bit of one position's KV, in the first plane of its block.
func (r *rogue) flipKV(blocks []block, position int) {
	r.Helper()
	b := blocks[position/model.BlockTokens]
	const row = 2 * 32 * 4 // bytes of a position in a plane: two heads of 32 floats
	r.flip(b.slab, b.number*int(b.slab.Bytes)/kv.SlabBlocks+position%model.BlockTokens*row+1)
}

// newest is the last message that a stage was sent.
func (r *rogue) newest(role string) []byte {
	r.Helper()
	for _, m := range slices.Backward(r.snapshot()) {
		if to(role)(m) {
			return m.Data
		}
	}
	r.Fatal("no message to " + role + " was seen")
	return nil
}

// snapshot is all messages to stages so far: those, too, that NATS has sent and that have not been looked at yet.
func (r *rogue) snapshot() []*nats.Msg {
	r.Helper()
	r.must(r.conn.Flush())
	for _, sub := range r.subs {
		eventually(r, "all messages are seen", func() bool {
			waiting, _, err := sub.Pending()
			r.must(err)
			return waiting == 0
		})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.seen)
}

// in makes t the test that the rogue works for, until the returned function is called.
func (r *rogue) in(t *testing.T) (out func()) {
	outer := r.TB
	r.TB = t
	return func() { r.TB = outer }
}

var queues = map[string][2]string{
	stage.Encode:  {wire.StreamEncode, wire.ConsumerEncode},
	stage.Prefill: {wire.StreamPrefill, wire.ConsumerPrefill},
	stage.Decode:  {wire.StreamDecode, wire.ConsumerDecode},
}

// hold keeps messages of a stage in its queue until release.
func (r *rogue) hold(role string) (release func()) {
	r.Helper()
	s, err := r.js.Stream(r.Context(), queues[role][0])
	r.must(err)
	_, err = s.PauseConsumer(r.Context(), queues[role][1], time.Now().Add(time.Hour))
	r.must(err)
	info, err := s.Info(r.Context())
	r.must(err)
	r.held = info.State.LastSeq
	return func() {
		r.Helper()
		_, err := s.ResumeConsumer(r.Context(), queues[role][1])
		r.must(err)
		r.publish(wire.StageSubject(role, ""), []byte("no message")) // else the server looks again only when a pull has expired
	}
}

// message waits for the first message in a stage's queue since it was held, and may replace it.
func (r *rogue) message(role string, replace func(data []byte) []byte) []byte {
	r.Helper()
	s, err := r.js.Stream(r.Context(), queues[role][0])
	r.must(err)
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		m, err := s.GetMsg(r.Context(), r.held+1)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		r.must(err)
		if replace != nil {
			r.must(s.DeleteMsg(r.Context(), m.Sequence))
			r.publish(m.Subject, replace(m.Data))
		}
		return m.Data
	}
	r.Fatal("no message came to the queue of " + role)
	return nil
}

func (r *rogue) publish(subject string, data []byte) {
	r.Helper()
	_, err := r.js.Publish(r.Context(), subject, data)
	r.must(err)
}

// decoded is a message's content; encoded is the reverse.
func decoded[T any](r *rogue, data []byte) *T {
	r.Helper()
	m := new(T)
	r.must(wire.Unmarshal(data, m))
	return m
}

func encoded(r *rogue, m any) []byte {
	r.Helper()
	data, err := wire.Marshal(m)
	r.must(err)
	return data
}

// altered replaces the message in a queue by one that is changed.
func altered[T any](role string, change func(r *rogue, m *T)) func(r *rogue) {
	return func(r *rogue) {
		r.message(role, func(data []byte) []byte {
			m := decoded[T](r, data)
			change(r, m)
			return encoded(r, m)
		})
	}
}

// spoiled does harm to what the message in a queue names.
func spoiled[T any](role string, harm func(r *rogue, m *T)) func(r *rogue) {
	return func(r *rogue) { harm(r, decoded[T](r, r.message(role, nil))) }
}

// replayed publishes what was seen before again, while the message in a queue waits.
func replayed(role string, which func(m *nats.Msg) bool) func(r *rogue) {
	return func(r *rogue) {
		r.message(role, nil)
		again := slices.DeleteFunc(r.snapshot(), func(m *nats.Msg) bool { return !which(m) })
		if len(again) == 0 {
			r.Error("there is nothing to replay")
		}
		for _, m := range again {
			r.publish(m.Subject, m.Data)
		}
	}
}

func to(role string) func(m *nats.Msg) bool {
	return func(m *nats.Msg) bool { return strings.HasPrefix(m.Subject, "trireme."+role+".") }
}

func all(*nats.Msg) bool { return true }

// block is where a block of a sequence lies.
type block struct {
	slab   mem.Handle
	number int
}

// blocks lists where the blocks of a sequence lie.
func (r *rogue) blocks(d *wire.Decode) (found []block) {
	r.Helper()
	r.log(d, func(log *kv.Log, slab func(int) mem.Handle) {
		for i := range log.BlockCount() {
			ref, err := log.Block(i)
			r.must(err)
			found = append(found, block{slab(ref.Slab), ref.Block})
		}
	})
	return found
}

// Whatever happens to bytes, handles and messages between two stages, the answer is the undisturbed one: the harm is
// found, and the attempt started again, or it has no effect.
func TestHarmIsFound(t *testing.T) {
	t.Parallel()
	c := inProcess(t, false)
	r := newRogue(t, c)
	const tokens = 40 // of the answer, with sealed blocks and an open one
	ask := func(system, salt string) (streamed, error) {
		p := openai.ChatCompletionNewParams{
			Model: "shapes-vl-moe", Temperature: openai.Float(0), MaxTokens: openai.Int(tokens),
			Messages: []openai.ChatCompletionMessageParamUnion{
				openai.SystemMessage(strings.Repeat(system, 30)), userMessage(t, "Describe the image.", "case15_0.png"),
			},
		}
		p.SetExtraFields(map[string]any{"ignore_eos": true, "cache_salt": salt})
		return c.stream(t.Context(), p, nil)
	}
	const system, another = "Count from 3 to 57. ", "Where is the star? "
	want, err := ask(system, "undisturbed")
	if err != nil {
		t.Fatal(err)
	}
	prompt := int(want.usage.PromptTokens)
	const copied, shared = 17 * model.BlockTokens, 3 * model.BlockTokens // positions of a cached prompt
	if prompt < copied+model.BlockTokens || prompt%model.BlockTokens == 0 {
		t.Fatalf("a prompt of %d tokens, want a slab, more, and an open block", prompt)
	}
	ended := r.newest(stage.Decode)
	forge := func(h *mem.Handle) {
		h.Capability = slices.Clone(h.Capability)
		h.Capability[5] ^= 1
	}
	var cached []block // of the prompt that was asked before
	flip := func(position int) func(*rogue, *wire.Decode) {
		return func(r *rogue, m *wire.Decode) { r.flipKV(r.blocks(m), position) }
	}

	type (
		encode  = wire.Encode
		prefill = wire.Prefill
		decode  = wire.Decode
	)
	for _, x := range []struct {
		name     string
		at       string // the stage whose message waits meanwhile
		harm     func(r *rogue)
		before   string // what was asked before with the same picture and salt
		restarts int
	}{
		{"nothing", stage.Encode, spoiled(stage.Encode, func(*rogue, *encode) {}), "", 0},
		{"nothing, cached", stage.Prefill, spoiled(stage.Prefill, func(*rogue, *prefill) {}), system, 0},

		{"picture changed", stage.Encode, spoiled(stage.Encode, func(r *rogue, m *encode) { r.flip(m.Pixels, 99) }), "", 1},
		{"picture forged", stage.Encode, altered(stage.Encode, func(_ *rogue, m *encode) { forge(&m.Pixels) }), "", 1},
		{"picture freed", stage.Encode, altered(stage.Encode, func(_ *rogue, m *encode) { m.Pixels.Generation-- }), "", 1},
		{"picture of another checksum", stage.Encode, altered(stage.Encode, func(_ *rogue, m *encode) { m.Pixels.CRC++ }), "", 1},
		{"picture's number used again", stage.Encode, altered(stage.Encode, func(r *rogue, m *encode) {
			objs, err := r.client.Alloc(r.Context(), hbm.Spec{Kind: mem.KindPixels, NPU: mem.HostNPU, Bytes: m.Pixels.Bytes})
			r.must(err)
			m.Pixels.Object = objs[0].Handle().Object
			r.free(objs[0])
		}), "", 1},
		{"picture of another place", stage.Encode, altered(stage.Encode, func(_ *rogue, m *encode) { m.Part = 7 }), "", 1},
		{"encode message twice", stage.Encode, replayed(stage.Encode, to(stage.Encode)), "", 0},

		{"MM object changed", stage.Prefill, spoiled(stage.Prefill, func(r *rogue, m *prefill) { r.flip(m.MM[0], 5000) }), "", 1},
		{"cached MM object changed", stage.Prefill, spoiled(stage.Prefill, func(r *rogue, m *prefill) {
			if m.Hits != 1 {
				r.Error("the picture was not in the cache")
			}
			r.flip(m.MM[0], 5000)
		}), another, 1},
		{"MM object forged", stage.Prefill, altered(stage.Prefill, func(_ *rogue, m *prefill) { forge(&m.MM[0]) }), "", 1},
		{"MM object's number used again", stage.Prefill, altered(stage.Prefill, func(_ *rogue, m *prefill) { m.MM[0].Generation++ }), "", 1},
		{"MM object of another size", stage.Prefill, altered(stage.Prefill, func(_ *rogue, m *prefill) { m.MM[0].Bytes /= 2 }), "", 1},
		{"MM object left out", stage.Prefill, altered(stage.Prefill, func(_ *rogue, m *prefill) { m.MM[0] = mem.Handle{} }), "", 1},
		{"no MM object", stage.Prefill, altered(stage.Prefill, func(_ *rogue, m *prefill) { m.MM = nil }), "", 1},
		{"a picture for an MM object", stage.Prefill, altered(stage.Prefill, func(r *rogue, m *prefill) {
			m.MM[0] = decoded[encode](r, r.newest(stage.Encode)).Pixels
		}), "", 1},
		{"prefill message twice", stage.Prefill, replayed(stage.Prefill, to(stage.Prefill)), "", 0},

		{"shared KV changed", stage.Prefill, spoiled(stage.Prefill, func(r *rogue, _ *prefill) { r.flipKV(cached, shared) }), system, 1},
		{"KV to be copied changed", stage.Prefill, spoiled(stage.Prefill, func(r *rogue, _ *prefill) { r.flipKV(cached, copied) }), system, 0},

		{"first KV block changed", stage.Decode, spoiled(stage.Decode, flip(0)), "", 1},
		{"shared KV changed late", stage.Decode, spoiled(stage.Decode, flip(shared)), system, 1},
		{"copied KV changed late", stage.Decode, spoiled(stage.Decode, flip(copied)), system, 1},
		{"last full KV block changed", stage.Decode, spoiled(stage.Decode, flip(prompt/model.BlockTokens*model.BlockTokens-1)), "", 1},
		{"open KV block changed", stage.Decode, spoiled(stage.Decode, flip(prompt-1)), "", 1},
		{"log's header changed", stage.Decode, spoiled(stage.Decode, func(r *rogue, m *decode) { r.flip(m.Log, 57) }), "", 1},
		{"log's counter changed", stage.Decode, spoiled(stage.Decode, func(r *rogue, m *decode) { r.flip(m.Log, 88) }), "", 1},
		{"log's slab changed", stage.Decode, spoiled(stage.Decode, func(r *rogue, m *decode) { r.flip(m.Log, 256+3) }), "", 1},
		{"log's token changed", stage.Decode, spoiled(stage.Decode, func(r *rogue, m *decode) {
			r.log(m, func(log *kv.Log, _ func(int) mem.Handle) { r.flip(m.Log, int(log.Shape().Bytes())-tokens*24+4) })
		}), "", 1},
		{"log forged", stage.Decode, altered(stage.Decode, func(_ *rogue, m *decode) { forge(&m.Log) }), "", 1},
		{"log's number used again", stage.Decode, altered(stage.Decode, func(_ *rogue, m *decode) { m.Log.Generation++ }), "", 1},
		{"a slab for the log", stage.Decode, altered(stage.Decode, func(r *rogue, m *decode) { m.Log = r.blocks(m)[0].slab }), "", 1},
		{"log of a request that has ended", stage.Decode, altered(stage.Decode, func(r *rogue, m *decode) {
			m.Log = decoded[decode](r, ended).Log
		}), "", 1},
		{"decode message twice", stage.Decode, replayed(stage.Decode, to(stage.Decode)), "", 0},
		{"all messages of all requests again", stage.Decode, replayed(stage.Decode, all), "", 0},
	} {
		t.Run(x.name, func(t *testing.T) {
			defer r.in(t)()
			if x.before != "" {
				release := r.hold(stage.Decode)
				var looking sync.WaitGroup
				looking.Go(func() {
					cached = r.blocks(decoded[wire.Decode](r, r.message(stage.Decode, nil)))
					release()
				})
				s, err := ask(x.before, x.name)
				looking.Wait()
				if err != nil || x.before == system && s.text != want.text {
					t.Fatalf("before the harm: %q, %v", s.text, err)
				}
			}
			restarts := c.metric(t, "trireme_request_restarts_total")
			release := r.hold(x.at)
			type result struct {
				streamed
				err error
			}
			done := make(chan result, 1)
			go func() {
				s, err := ask(system, x.name)
				done <- result{s, err}
			}()
			x.harm(r)
			release()
			got := <-done
			if got.err != nil || got.text != want.text || got.finish != want.finish ||
				got.usage.CompletionTokens != want.usage.CompletionTokens || got.usage.PromptTokens != want.usage.PromptTokens {
				t.Errorf("%q (%s, %+v), %v; undisturbed %q (%s)", got.text, got.finish, got.usage, got.err, want.text, want.finish)
			}
			if n := c.metric(t, "trireme_request_restarts_total") - restarts; n != x.restarts {
				t.Errorf("%d restarts, want %d", n, x.restarts)
			}
		})
	}
	if s, err := ask(system, "in the end"); err != nil || s.text != want.text {
		t.Errorf("in the end %q, %v", s.text, err)
	}
	c.expectNoMemory(t)
}
