// Package stagetest gives the tests of a stage everything around it: a real nats-server, a real HMM, the bundled model,
// and the other parties of a request, which the test plays by speaking the wire protocol: a gateway that takes tokens
// and confirms them, a prefill that leaves KV and a token log, and a reference that answers a request alone. It is no
// part of a running system.
package stagetest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/npu"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// HMM runs an HMM daemon of 4 NPUs until ctx ends: services/hmm, which shared code must not import.
type HMM func(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error

// patience is how long a test waits for what must happen.
const patience = time.Minute

// Rig is one test's surroundings. They end with the test.
type Rig struct {
	Stage stage.Config // for the stages under test
	Log   *slog.Logger
	Bus   *bus.Bus    // the test's own
	HBM   *hbm.Client // the test's own, with one NPU
	Model *Model

	NATS    *bustest.Server
	StopHMM func() // ends the HMM before the test's end

	tb                 testing.TB
	requests, gateways int // made so far
	messages           atomic.Int64
}

// Long and Short are times after which a message that nobody keeps in progress comes again: longer than any test, and
// as short as a busy machine allows, on which who keeps it may stand still for two seconds.
const (
	Long  = 10 * time.Minute
	Short = 4 * time.Second
)

// New starts NATS and an HMM, connects to both and opens the model.
func New(tb testing.TB, hmm HMM, ackWait time.Duration) *Rig {
	tb.Helper()
	server := bustest.Run(tb)
	conn, err := nats.Connect(server.URL())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(conn.Close)
	dir, err := os.MkdirTemp("", "rig") // short: a socket's path has 107 bytes
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	r := &Rig{tb: tb, NATS: server, Log: slog.New(slog.NewTextHandler(&testLog{tb: tb}, &slog.HandlerOptions{Level: slog.LevelInfo}))}
	r.Stage = stage.Config{
		NATSURL: server.URL(), HMM: filepath.Join(dir, "s"), Model: Root("models/shapes-vl-moe"), AckWait: ackWait,
		NPU: npu.Options{Threads: 1},
	}
	r.StopHMM = r.Go("hmm", func(ctx context.Context) error { return hmm(ctx, r.Stage.HMM, conn, r.Log) })
	if r.Bus, err = bus.Connect(tb.Context(), r.Stage.NATSURL, "test", r.Log, bus.WithAckWait(ackWait)); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(r.Bus.Close)
	if r.HBM, err = hbm.Dial(tb.Context(), r.Stage.HMM, hbm.Hello{Instance: "test", Role: "test", NPUs: 1}); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { r.HBM.Close() })
	r.Model = openModel(tb)
	return r
}

// testLog writes to the test's log while the test runs.
type testLog struct {
	mu sync.Mutex
	tb testing.TB
}

func (l *testLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tb.Logf("%s", strings.TrimSuffix(string(p), "\n"))
	return len(p), nil
}

// Root is a path of the repository.
func Root(path string) string {
	dir, err := os.Getwd()
	for ; err == nil; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, path)
		}
		if dir == filepath.Dir(dir) {
			break
		}
	}
	panic(fmt.Sprintf("BUG: no go.mod above the test: %v", err))
}

// Go runs f until the returned stop, or the test's end, ends its context and it has returned. An error is the test's.
func (r *Rig) Go(name string, f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := f(ctx); err != nil {
			r.tb.Errorf("%s ended: %v", name, err)
		}
	}()
	stop = func() { cancel(); <-ended }
	r.tb.Cleanup(stop)
	return stop
}

// Open opens a stage process; serve runs it (see Go) once change, if not nil, has been called on it. It is closed when
// it has ended.
func (r *Rig) Open(role string, serve func(context.Context, *stage.Stage) error) (s *stage.Stage, stop func()) {
	r.tb.Helper()
	s, err := stage.Open(r.tb.Context(), role, r.Stage, r.Log)
	if err != nil {
		r.tb.Fatal(err)
	}
	stop = r.Go(s.ID, func(ctx context.Context) error {
		defer s.Close()
		return serve(ctx, s)
	})
	r.Until(s.ID+" is ready", s.Ready)
	return s, stop
}

// Until waits until ok. If that takes too long the test fails, and says what state tells.
func (r *Rig) Until(what string, ok func() bool, state ...func() string) {
	r.tb.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			for _, s := range state {
				r.tb.Log(s())
			}
			r.tb.Fatalf("after %v still not: %s", patience, what)
		}
	}
}

// Request names a new request of a gateway.
func (r *Rig) Request(gateway string) wire.Request {
	r.requests++
	return wire.Request{ID: fmt.Sprintf("request%d", r.requests), Attempt: 1, Gateway: gateway, Left: time.Minute}
}

// Publish puts a message on a stage's queue.
func (r *Rig) Publish(role, request string, m any) {
	r.tb.Helper()
	id := fmt.Sprintf("message%d", r.messages.Add(1)) // or a try that is slow to be confirmed leaves a second message
	if err := r.Bus.Publish(r.tb.Context(), role, request, id, m); err != nil {
		r.tb.Fatal(err)
	}
}

// Done tells that a request, or a choice of it, has ended.
func (r *Rig) Done(request string, choice int) {
	r.tb.Helper()
	if err := r.Bus.Send(wire.SubjectDone, &wire.Done{Request: request, Choice: choice}); err != nil {
		r.tb.Fatal(err)
	}
}

// Cancel ends requests, as a gateway does on NATS, and waits until a stage has ended what it does for them.
func (r *Rig) Cancel(s *stage.Stage, requests ...wire.Request) {
	r.tb.Helper()
	for _, req := range requests {
		r.Done(req.ID, -1)
	}
	r.Heard(s)
	for _, req := range requests {
		if !s.Ended(req, -1) {
			r.tb.Errorf("%s does not know of the end of %s", s.ID, req.ID)
		}
	}
}

// Heard waits until a stage has done what follows from all ends that were told so far: it takes one after the other.
func (r *Rig) Heard(s *stage.Stage) {
	r.tb.Helper()
	last := r.Request("nobody")
	r.Done(last.ID, -1)
	r.Until(s.ID+" knows of the end", func() bool { return s.Ended(last, -1) })
}

// Queue is the number of a stage's messages that wait and of those that are being worked on.
func (r *Rig) Queue(role string) (waiting, taken int) {
	r.tb.Helper()
	names := map[string][2]string{
		stage.Encode:  {wire.StreamEncode, wire.ConsumerEncode},
		stage.Prefill: {wire.StreamPrefill, wire.ConsumerPrefill},
		stage.Decode:  {wire.StreamDecode, wire.ConsumerDecode},
	}[role]
	c, err := r.Bus.JetStream().Consumer(r.tb.Context(), names[0], names[1])
	if err != nil {
		r.tb.Fatal(err)
	}
	info := c.CachedInfo()
	return int(info.NumPending), info.NumAckPending
}

// Empty waits until a stage's queue is empty, nothing is being worked on.
func (r *Rig) Empty(role string) {
	r.tb.Helper()
	r.Until("the "+role+" queue is empty", func() bool {
		waiting, taken := r.Queue(role)
		return waiting+taken == 0
	})
}

// NoMemory waits until the HMM holds nothing and nobody claims anything.
func (r *Rig) NoMemory() {
	r.tb.Helper()
	var stats hbm.Stats
	r.Until("no memory is held", func() bool {
		stats = r.Stats()
		return stats.Objects == stats.Resting && stats.Claims == 0
	})
}

// NoRequest waits until the HMM knows of no request that has not ended.
func (r *Rig) NoRequest() {
	r.tb.Helper()
	r.Until("no request is known", func() bool { return r.Stats().Requests == 0 })
}

// Stats asks the HMM.
func (r *Rig) Stats() hbm.Stats {
	r.tb.Helper()
	s, err := r.HBM.Stats(r.tb.Context())
	if err != nil {
		r.tb.Fatal(err)
	}
	return s
}

// Outcomes is how many messages a stage has settled with an outcome (see stage.Metrics).
func (r *Rig) Outcomes(s *stage.Stage, outcome string) int {
	r.tb.Helper()
	return r.counted(s, "trireme_stage_work_total", "outcome", outcome)
}

// Offers is how many offers of a stage have ended so (see stage.Metrics).
func (r *Rig) Offers(s *stage.Stage, outcome string) int {
	r.tb.Helper()
	return r.counted(s, "trireme_stage_offers_total", "outcome", outcome)
}

// Copied is how many bytes a role of a stage has copied from other memory domains.
func (r *Rig) Copied(s *stage.Stage, role string) int {
	r.tb.Helper()
	return r.counted(s, "trireme_stage_copied_bytes_total", "role", role)
}

// counted is the value of a stage's counter whose label has a value, 0 if there is none.
func (r *Rig) counted(s *stage.Stage, counter, label, value string) int {
	r.tb.Helper()
	families, err := s.Metrics.Registry.Gather()
	if err != nil {
		r.tb.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if f.GetName() == counter && l.GetName() == label && l.GetValue() == value {
					return int(m.GetCounter().GetValue())
				}
			}
		}
	}
	return 0
}

// Attach maps an object for the test; it is freed with the test's client.
func (r *Rig) Attach(access mem.Access, h mem.Handle) *hbm.Object {
	r.tb.Helper()
	objs, err := r.HBM.Attach(r.tb.Context(), access, -1, h)
	if err != nil {
		r.tb.Fatal(err)
	}
	return objs[0]
}

// Put makes a sealed object held by a request, of pixels or a spec in host memory as a gateway does, or of something
// else on the test's NPU.
func (r *Rig) Put(req wire.Request, kind mem.Kind, data []byte) mem.Handle {
	r.tb.Helper()
	return r.put(req, kind, data, func(*hbm.Object) {})
}

// Spoiled is Put, and then flips a bit through a map for writing that another process had before the seal.
func (r *Rig) Spoiled(req wire.Request, kind mem.Kind, data []byte) mem.Handle {
	r.tb.Helper()
	other, err := hbm.Dial(r.tb.Context(), r.Stage.HMM, hbm.Hello{Instance: "spoiler", Role: "test"})
	if err != nil {
		r.tb.Fatal(err)
	}
	defer other.Close()
	var theirs []*hbm.Object
	h := r.put(req, kind, data, func(o *hbm.Object) {
		if theirs, err = other.Attach(r.tb.Context(), mem.ReadWrite, -1, o.Handle()); err != nil {
			r.tb.Fatal(err)
		}
	})
	theirs[0].Bytes()[len(data)/2] ^= 1
	return h
}

// put is Put, with a look at the object before the seal.
func (r *Rig) put(req wire.Request, kind mem.Kind, data []byte, before func(*hbm.Object)) mem.Handle {
	r.tb.Helper()
	npu := r.HBM.NPUs()[0]
	if kind == mem.KindPixels || kind == mem.KindSpec {
		npu = mem.HostNPU
	}
	objs, err := r.HBM.Alloc(r.tb.Context(), hbm.Spec{Kind: kind, NPU: npu, Bytes: int64(len(data))})
	if err != nil {
		r.tb.Fatal(err)
	}
	copy(objs[0].Bytes(), data)
	before(objs[0])
	handles, err := r.HBM.Seal(r.tb.Context(), stage.Ref(req), objs...)
	if err != nil {
		r.tb.Fatal(err)
	}
	r.Free(objs...)
	return handles[0]
}

// Free drops the test's own holds.
func (r *Rig) Free(objs ...*hbm.Object) {
	r.tb.Helper()
	if err := r.HBM.Free(context.WithoutCancel(r.tb.Context()), objs...); err != nil {
		r.tb.Fatal(err)
	}
}
