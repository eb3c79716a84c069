// Package stage is what the encode, prefill and decode processes do alike: connect, load the model, take work from
// their queue, fence it with claims, say that they are alive, and hand work back when they stop. What they do with the
// work is in services/encoder, services/prefill and services/decoder.
package stage

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/imageprep"
	"trireme.dev/shared/kernel"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/npu"
	"trireme.dev/shared/wire"
)

// Roles, which are also the names of the stages' queues.
const (
	Encode  = "encode"
	Prefill = "prefill"
	Decode  = "decode"
)

// Config is what every stage process is started with.
type Config struct {
	NATSURL  string
	HMM      string // path of the HMM's socket
	Model    string // Hugging Face folder
	Instance string // instance id; "": role and a random suffix
	Metrics  string // address that serves /metrics, for the heartbeat; "": none
	NPU      npu.Options
	AckWait  time.Duration // see bus.WithAckWait, the same for all services on one NATS; 0: the bus' default

	// Loading, if not nil, is called now and then while weights are loaded, by this or another process: bytes so far and in all.
	Loading func(done, total int64)
}

// Stage is a connected stage process.
type Stage struct {
	ID      string
	Role    string
	Bus     *bus.Bus
	HBM     *hbm.Client
	Model   model.Config
	Weights *model.Weights // of the role: the vision encoder's for encode, else the language model's
	Compute kernel.Compute
	NPU     int // the NPU on this node that the HMM granted
	Log     *slog.Logger
	Metrics *Metrics

	dir       string
	processor [32]byte // digest of the image processor
	folder    *hf.Folder
	weights   *weights
	instances *bus.Instances
	ready     atomic.Bool
	running   atomic.Int64
	ended     endedSet
	onEnd     func(wire.Done)
	address   string
}

// Open checks the model folder, connects to NATS and to the HMM, takes one NPU, and loads the weights or attaches those that
// another process of the node has loaded. Nothing is announced before Serve.
func Open(ctx context.Context, role string, cfg Config, log *slog.Logger) (_ *Stage, err error) {
	s := &Stage{ID: cfg.Instance, Role: role, dir: cfg.Model, address: cfg.Metrics, Metrics: newMetrics(role)}
	if s.ID == "" {
		s.ID = NewID(role)
	}
	s.Log = log.With("instance", s.ID)
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.folder, err = hf.Open(cfg.Model); err != nil {
		return nil, err
	}
	s.Model = s.folder.Config
	if s.Model.Vision != nil {
		prep, err := imageprep.LoadConfig(cfg.Model)
		if err != nil {
			return nil, err
		}
		s.processor = prep.Digest()
	}
	if s.Compute, err = npu.Open(cfg.NPU); err != nil {
		return nil, err
	}
	if s.Bus, err = bus.Connect(ctx, cfg.NATSURL, s.ID, s.Log, bus.WithAckWait(cfg.AckWait)); err != nil {
		return nil, err
	}
	if s.instances, err = s.Bus.Instances(ctx); err != nil {
		return nil, err
	}
	if s.HBM, err = hbm.Dial(ctx, cfg.HMM, hbm.Hello{Instance: s.ID, Role: role, NPUs: 1}); err != nil {
		return nil, err
	}
	s.NPU = s.HBM.NPUs()[0]
	if err := s.loadWeights(ctx, cfg.Loading); err != nil {
		return nil, err
	}
	return s, nil
}

// NewID makes an instance id: the role and 8 random hexadecimal digits.
func NewID(role string) string {
	var b [4]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic("BUG: no random numbers: " + err.Error())
	}
	return role + "-" + hex.EncodeToString(b[:])
}

// Ready reports whether the stage takes work.
func (s *Stage) Ready() bool { return s.ready.Load() }

// Dir is the model folder.
func (s *Stage) Dir() string { return s.dir }

// Close gives everything back. Work that is still claimed is succeeded by others.
func (s *Stage) Close() {
	if s.weights != nil {
		s.weights.close()
	}
	if s.HBM != nil {
		s.HBM.Close()
	}
	if s.Bus != nil {
		s.Bus.Close()
	}
	if s.Compute != nil {
		s.Compute.Close()
	}
	if s.folder != nil {
		s.folder.Close()
	}
}

// OnEnd sets what is called, on its own goroutine, for every Done event. It must be set before Serve.
func (s *Stage) OnEnd(f func(wire.Done)) { s.onEnd = f }

// Ended reports whether a request, or this choice of it, is known to need nothing any more.
func (s *Stage) Ended(request string, choice int) bool { return s.ended.has(request, choice) }

// pullWait is how long one pull waits for a message at the server.
const pullWait = 5 * time.Second

// Serve announces the stage and runs handle for each message of its queue, at most slots at once, each on a goroutine
// of its own. It returns nil when ctx ends, after all handles have returned, or an error when the HMM is lost: every
// mapping is then useless and the process must start anew. handle settles its delivery; its context ends in both cases.
func (s *Stage) Serve(ctx context.Context, slots int, handle func(context.Context, *bus.Delivery)) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	wg.Go(func() {
		select {
		case <-s.HBM.Lost():
			cancel(mem.ErrLost)
		case <-ctx.Done():
		}
	})
	gone := make(chan struct{}, 1) // an instance of this role may have gone
	leave, err := s.listen(ctx, gone)
	defer leave()
	if err != nil {
		return err
	}
	consumer, err := s.Bus.Consumer(ctx, s.Role)
	if err != nil {
		return fmt.Errorf("opening the %s queue: %w", s.Role, err)
	}
	wg.Go(func() {
		if err := s.Bus.Announce(ctx, s.heartbeat); err != nil && ctx.Err() == nil {
			s.Log.Error("heartbeat ended", "error", err)
		}
	})
	s.weights.wait(ctx)
	s.ready.Store(true)
	defer s.ready.Store(false)
	s.takeOver(ctx)
	select {
	case gone <- struct{}{}:
	default:
	}
	wg.Go(func() {
		for {
			select {
			case <-gone:
				s.handBackStrays(ctx)
			case <-ctx.Done():
				return
			}
		}
	})
	s.Log.Info("ready", "role", s.Role, "npu", s.NPU, "model", s.Model.Name, "kernels", s.Compute.Digest())

	busy := make(chan struct{}, slots)
	for enter(ctx, busy) {
		batch, err := consumer.Next(ctx, 1+cap(busy)-len(busy), pullWait)
		<-busy
		for _, d := range batch {
			busy <- struct{}{} // there is room: nobody else enters
			s.running.Add(1)
			wg.Go(func() {
				defer func() { <-busy; s.running.Add(-1) }()
				handle(ctx, d)
			})
		}
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("pulling work: %w", err)
		}
	}
	if err := context.Cause(ctx); errors.Is(err, mem.ErrLost) {
		return fmt.Errorf("serving %s: %w", s.Role, err)
	}
	return nil
}

// enter waits for a free place; false when ctx ends first.
func enter(ctx context.Context, places chan<- struct{}) bool {
	if ctx.Err() != nil {
		return false
	}
	select {
	case places <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

// listen subscribes to ends of requests and of instances until leave is called, which is never nil. gone gets a value, if
// there is room, when an instance of this role has gone.
func (s *Stage) listen(ctx context.Context, gone chan<- struct{}) (leave func(), err error) {
	var subs []*nats.Subscription
	leave = func() {
		for _, sub := range subs {
			_ = sub.Unsubscribe() // it ends with the connection at the latest
		}
	}
	for subject, f := range map[string]func([]byte){
		wire.SubjectDone: s.done,
		wire.SubjectGone: func(data []byte) {
			var m wire.Gone
			if wire.Unmarshal(data, &m) == nil && m.Role == s.Role {
				s.takeOver(ctx)
				select {
				case gone <- struct{}{}:
				default: // one look is due anyway
				}
			}
		},
	} {
		sub, err := s.Bus.Handle(subject, func(data []byte, _ func(any) error) { f(data) })
		if err != nil {
			return leave, fmt.Errorf("listening for ends: %w", err)
		}
		subs = append(subs, sub)
	}
	return leave, nil
}

// done notes the end of a request or of a choice.
func (s *Stage) done(data []byte) {
	var m wire.Done
	if err := wire.Unmarshal(data, &m); err != nil {
		s.Log.Warn("ignoring a done event", "error", err)
		return
	}
	s.ended.add(m.Request, m.Choice)
	if s.onEnd != nil {
		s.onEnd(m)
	}
}

// deadWait is the delay of a dead instance's message: NATS may not have seen yet that the instance's connection has
// ended, and would send the message there.
const deadWait = 30 * time.Millisecond

// takeOver hands back to the queue what gone instances of this role had claimed, so that it comes to a live one at
// once and not after AckWait. The HMM gives each orphan to one caller.
func (s *Stage) takeOver(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	orphans, err := s.HBM.Orphans(ctx, s.Role)
	if err != nil {
		if ctx.Err() == nil {
			s.Log.Warn("asking for orphaned claims", "error", err)
		}
		return
	}
	for _, o := range orphans {
		if err := s.Bus.NakReply(o.Reply, deadWait); err != nil {
			s.Log.Warn("handing back a gone instance's message", "request", o.Part.Request, "error", err)
			continue
		}
		s.Log.Info("taking over", "request", o.Part.Request, "part", o.Part.Part)
	}
}

func (s *Stage) heartbeat() wire.Instance {
	return wire.Instance{
		ID: s.ID, Role: s.Role, Node: s.HBM.Node(), PID: os.Getpid(), NPUs: s.HBM.NPUs(), Ready: s.ready.Load(),
		Model: s.Model.Name, Digest: hex.EncodeToString(s.Model.Digest[:]), Kernels: s.Compute.Digest(),
		Running: int(s.running.Load()), Metrics: s.address,
	}
}

// GatewayAlive reports whether the gateway's heartbeat stands.
func (s *Stage) GatewayAlive(id string) bool {
	for _, g := range s.instances.Role("gateway") {
		if g.ID == id {
			return true
		}
	}
	return false
}

// Ref is the request hold of req.
func Ref(req wire.Request) hbm.Ref {
	return hbm.Ref{Request: req.ID, Attempt: req.Attempt, Left: req.Left}
}

// Free drops objects, also when ctx has ended.
func (s *Stage) Free(ctx context.Context, objs ...*hbm.Object) {
	if len(objs) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := s.HBM.Free(ctx, objs...); err != nil && !errors.Is(err, mem.ErrLost) {
		s.Log.Warn("freeing objects", "error", err)
	}
}
