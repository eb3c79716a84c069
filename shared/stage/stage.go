// Package stage is what the encode, prefill and decode processes do alike: connect, load the model, take work from
// their queues, fence it with claims, say that they are alive, and hand work back when they stop. What they do with the
// work is in services/encoder, services/prefill and services/decoder. A process may have several of these roles: they share
// its connections, its NPU, its weights and the one goroutine that computes (stage/runner).
package stage

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/engine"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/imageprep"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/npu"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/stage/runner"
	"trireme.dev/shared/wire"
)

// Roles, which are also the names of the stages' queues. A process with several has them joined (wire.Roles).
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
	Instance string // instance id; "": the name or role and a random suffix
	Name     string // stable name, which the process that is started in the place of this one has, too (hbm.Hello); "": none
	Metrics  string // address that serves /metrics, for the heartbeat; "": none
	NPU      npu.Options
	NPUs     int           // of the instance, each opened so; they share the threads. 0: 1
	Standby  bool          // instead of NPUs: it begins without any
	Mixed    sched.Mixed   // bounds steps in which prompts are computed beside sequences that decode; zero: MixedDefault
	AckWait  time.Duration // see bus.WithAckWait, the same for all services on one NATS; 0: the bus' default
	Drain    time.Duration // a process that is to stop may finish what is short for so long; 0: DefaultDrain, below 0: not at all
	Lease    time.Duration // a gateway without sign of life for longer has its requests given up; 0: DefaultLease
	Replicas int           // see bus.WithReplicas, the same for all services on one NATS; 0: automatic
	// OfferWait is the most that work waits longer at an instance that has what it needs than at the one that has taken it: see
	// sched.Routing. 0: DefaultOfferWait, below 0: nothing is offered to others.
	OfferWait    time.Duration
	OfferTimeout time.Duration // for the answer to an offer; 0: DefaultOfferTimeout

	// Indirection is the form in which kernels find experts: IndirectionTable, also where it is empty, or IndirectionRanges.
	Indirection string

	OwnWeights bool  // read the weights from disk although another process of the node has them
	DiskRate   int64 // bytes a second that weights are read with which others have; 0: as they come
	Without    Without

	// Loading, if not nil, is called now and then while weights are loaded, by this or another process: bytes so far and in all.
	Loading func(done, total int64)
}

// MixedDefault is the budget of a step in which prompts are computed beside sequences that decode.
var MixedDefault = sched.Mixed{Tokens: 128, Blocks: 1 << 14, Least: model.BlockTokens}

// Role is one of the roles of a stage process, as a service provides it.
type Role struct {
	Name  string // Encode, Prefill or Decode
	Slots int    // messages of its queue in work at once, for each NPU
	Late  bool   // each message that is taken holds the role (Stage.Hold) until the worker says otherwise
	// Finish says that what is in work when the process is to stop is finished, as far as Config.Drain goes: it is short, and
	// would be done all over again elsewhere. Work of other roles goes on elsewhere from where it stands.
	Finish bool
	Start  func(*Stage) (Worker, error) // adds what the role computes to the stage's Runner, before that runs
}

// DefaultDrain is the Config.Drain of 0.
const DefaultDrain = 5 * time.Second

// Worker is a role at work. Its methods are called by many goroutines.
type Worker interface {
	// Handle works on a message and settles it (Stage.Work), and returns when both are done; ctx ends when the process is to
	// stop, or has lost the HMM.
	Handle(context.Context, *bus.Delivery)
	// Close is called after the last Handle.
	Close()
}

// Stage is a connected stage process.
type Stage struct {
	ID      string
	Name    string // see Config
	Role    string // several are joined
	Bus     *bus.Bus
	HBM     *hbm.Client
	Model   model.Config
	Runner  *runner.Runner
	Log     *slog.Logger
	Metrics *Metrics

	dir        string
	processor  [32]byte // digest of the image processor
	folder     *hf.Folder
	weights    *weights
	gateways   *gateways
	works      works
	ready      atomic.Bool
	load       load
	ended      endedSet
	short      shortage
	gate       gate
	slots      slots
	seats      seats
	changes    changes
	kernels    string
	offers     offers
	travel     travel
	roles      []Role      // served
	workers    []Worker    // theirs
	npuOptions npu.Options // of each NPU
	address    string
	paced      *pace.Profile // of the NPUs; nil: they are not paced
	mixed      sched.Mixed
	drainWait  time.Duration
}

// Open checks the model folder, connects to NATS and to the HMM, takes its NPUs, and loads the weights or attaches those that
// another process of the node has loaded. role may be several, joined. Nothing is announced before Serve.
func Open(ctx context.Context, role string, cfg Config, log *slog.Logger) (_ *Stage, err error) {
	s := &Stage{
		ID: cfg.Instance, Name: cfg.Name, Role: role, dir: cfg.Model, address: cfg.Metrics,
		Runner: runner.New(), mixed: cfg.Mixed,
	}
	s.gate.runner = s.Runner
	s.Runner.AddPieces(s.gate.round)
	if s.mixed == (sched.Mixed{}) {
		s.mixed = MixedDefault
	}
	if s.ID == "" {
		s.ID = NewID(s.Name, role)
	}
	s.drainWait = cmp.Or(cfg.Drain, DefaultDrain)
	s.offers.routing = sched.Routing{Least: offerLeast, Limit: cmp.Or(cfg.OfferWait, DefaultOfferWait)}
	s.offers.timeout = cmp.Or(cfg.OfferTimeout, DefaultOfferTimeout)
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
	asked := max(1, cfg.NPUs)
	if cfg.Standby {
		asked = 0
	}
	s.npuOptions = share(cfg.NPU, asked)
	first, err := npu.Open(s.npuOptions)
	if err != nil {
		return nil, err
	}
	s.setNPUs([]NPU{{NPU: engine.NPU{Compute: first}}})
	s.kernels = first.Digest()
	if c, ok := first.(*pace.Compute); ok {
		s.paced = c.Profile()
		s.Log = s.Log.With("paced", s.paced.Name)
	}
	s.Metrics = newMetrics(role, s.profile(), s.pacing, func() int { return setOf(s.NPUs()).Len() })
	if s.Bus, err = bus.Connect(ctx, cfg.NATSURL, s.ID, s.Log, bus.WithAckWait(cfg.AckWait), bus.WithReplicas(cfg.Replicas)); err != nil {
		return nil, err
	}
	gateways, err := s.Bus.Gateways(ctx)
	if err != nil {
		return nil, err
	}
	s.gateways = newGateways(s, gateways, cfg.Lease, bus.DefaultInstanceTTL)
	slow := time.AfterFunc(slowHMM, func() { s.Log.Warn("no HMM answers yet: waiting for `trireme hmm` of this node", "socket", cfg.HMM) })
	s.HBM, err = hbm.Dial(ctx, cfg.HMM, hbm.Hello{Instance: s.ID, Role: role, Name: s.Name})
	slow.Stop()
	if err != nil {
		return nil, err
	}
	s.changes = changes{stage: s, asked: asked}
	numbers, err := s.changes.restore(ctx)
	if err != nil {
		return nil, err
	}
	if err := s.openNPUs(first, numbers); err != nil {
		return nil, err
	}
	if err := s.loadWeights(ctx, &cfg); err != nil {
		return nil, err
	}
	return s, nil
}

// NewID makes an instance id: the name, or else the role, of several the first letters, and 8 random hexadecimal digits.
func NewID(name, role string) string {
	if roles := wire.Roles(role); len(roles) > 1 {
		role = ""
		for _, r := range roles {
			role += r[:1]
		}
	}
	var b [4]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic("BUG: no random numbers: " + err.Error())
	}
	return cmp.Or(name, role) + "-" + hex.EncodeToString(b[:])
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
	for _, n := range s.NPUs() {
		if n.Compute != nil {
			n.Compute.Close()
		}
	}
	if s.folder != nil {
		s.folder.Close()
	}
}

// Ended reports whether an attempt at a request, or at this choice of it, is known to need nothing any more; choice -1: all.
func (s *Stage) Ended(req wire.Request, choice int) bool { return s.ended.has(req, choice) }

// slowHMM is how long the start waits for the HMM of the node without a word.
const slowHMM = 2 * time.Second

// pullWait is how long one pull waits for a message at the server.
const pullWait = 5 * time.Second

// Serve starts the roles, which must be those that the stage was opened with, announces the stage, and has each message of
// their queues handled on a goroutine of its own. It returns nil when ctx ends, after all of these have returned, or an error
// when the HMM is lost: every mapping is then useless and the process must start anew.
//
// When ctx ends the stage is not ready any more, says so in its heartbeat, and takes nothing more. Roles that Finish have
// Config.Drain for what they have in work; all else is handed back at once, for a sibling to go on with.
func (s *Stage) Serve(ctx context.Context, roles ...Role) error {
	workers := make([]Worker, len(roles))
	names := make([]string, len(roles))
	for i, r := range roles {
		var err error
		if workers[i], err = r.Start(s); err != nil {
			return fmt.Errorf("starting to %s: %w", r.Name, err)
		}
		defer workers[i].Close()
		names[i] = r.Name
	}
	s.workers, s.roles = workers, roles
	s.load.onward = map[string]bool{Encode: slices.Contains(names, Prefill), Prefill: slices.Contains(names, Decode)}
	if !slices.Equal(names, wire.Roles(s.Role)) {
		panic(fmt.Sprintf("BUG: a stage opened as %s serves as %v", s.Role, names))
	}
	if err := s.Runner.Start(s.Model, engines(s.NPUs()), s.mixed, s.Metrics.step); err != nil {
		return err
	}
	defer s.Runner.Stop()
	return s.serve(ctx, roles, workers)
}

// serve is Serve once all is ready to work.
func (s *Stage) serve(ctx context.Context, roles []Role, workers []Worker) (err error) {
	defer func() {
		if err != nil {
			s.emit(wire.EventFailed, err.Error())
			return
		}
		s.changes.forget(ctx)
		s.emit(wire.EventStopped, "has handed over what it had in work")
	}()
	var wg, working sync.WaitGroup // working: those who take messages and work on them
	life, end := context.WithCancelCause(context.WithoutCancel(ctx))
	ctx, cancel := context.WithCancelCause(ctx) // of taking messages
	leave := func() {}
	defer func() {
		cancel(nil)
		s.ready.Store(false)
		s.drain(&working, end)
		end(nil)
		leave()
		wg.Wait()
	}()
	wg.Go(func() {
		select {
		case <-s.HBM.Lost():
			cancel(mem.ErrLost)
			end(mem.ErrLost)
		case <-life.Done():
		}
	})
	gone := make([]chan struct{}, len(roles)) // an instance of the role may have gone
	for i := range gone {
		gone[i] = make(chan struct{}, 1)
	}
	if leave, err = s.listen(ctx, roles, gone); err != nil {
		return err
	}
	queues := make([]*bus.Consumer, len(roles))
	for i, r := range roles {
		if queues[i], err = s.Bus.Consumer(ctx, r.Name); err != nil {
			return fmt.Errorf("opening the %s queue: %w", r.Name, err)
		}
	}
	wg.Go(func() {
		if err := s.Bus.Announce(life, s.heartbeat); err != nil && life.Err() == nil {
			s.Log.Error("heartbeat ended", "error", err)
		}
	})
	wg.Go(func() { s.gateways.run(life) })
	wg.Go(func() {
		if err := s.changes.serve(life); err != nil {
			s.Log.Error("nobody can change this instance", "error", err)
		}
	})
	s.weights.wait(ctx)
	s.ready.Store(true)
	s.makeRoom()
	for i, r := range roles {
		s.takeOver(ctx, r.Name)
		notify(gone[i])
		wg.Go(func() {
			for {
				select {
				case <-gone[i]:
					s.handBackStrays(ctx, r.Name)
				case <-ctx.Done():
					return
				}
			}
		})
	}
	s.tellReady()
	s.Log.Info("ready", "role", s.Role, "npus", s.HBM.NPUs(), "model", s.Model.Name, "kernels", s.Kernels())

	failed := make(chan error, len(roles))
	for i, r := range roles {
		work := ctx
		if r.Finish {
			work = life
		}
		t := &taker{
			role: r, worker: workers[i], life: work, working: &working, handle: workers[i].Handle,
		}
		t.open()
		working.Go(func() {
			defer s.offers.take(t)()
			if err := s.pull(ctx, queues[i], t); err != nil {
				failed <- fmt.Errorf("pulling work from the %s queue: %w", r.Name, err)
			}
		})
	}
	select {
	case err := <-failed:
		return err
	case err := <-s.changes.failed:
		return err
	case <-ctx.Done():
	}
	if err := context.Cause(ctx); errors.Is(err, mem.ErrLost) {
		return fmt.Errorf("serving %s: %w", s.Role, err)
	}
	return nil
}

// errDrained is why work ends that was not finished in the time that a process has which is to stop.
var errDrained = errors.New("the process stops")

// drain waits until all work is settled, and ends what takes longer than it may.
func (s *Stage) drain(working *sync.WaitGroup, end context.CancelCauseFunc) {
	late := time.AfterFunc(max(0, s.drainWait), func() { end(errDrained) })
	defer late.Stop()
	working.Wait()
}

// emit tells operators what happened to this instance.
func (s *Stage) emit(kind, text string) {
	s.Bus.Emit(wire.Event{Kind: kind, Node: s.HBM.Node(), Instance: s.ID, Role: s.Role, Text: text})
}

// pull has the messages of a role's queue handled, at most as many at once as it has room for, each on a goroutine of its own,
// until ctx ends. It asks at the level of the process' load, and anew when that changes.
func (s *Stage) pull(ctx context.Context, queue *bus.Consumer, t *taker) error {
	for s.gate.quiet(ctx) {
		level, has, room, changed := s.load.ask(t.role.Name)
		if room == 0 {
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		batch, err := queue.Take(ctx, bus.Ask{Limit: sched.Batch(has, room), Wait: pullWait, Level: level, Stale: changed})
		for _, d := range batch {
			if ctx.Err() != nil { // not to be begun any more
				s.handBack(d, wire.Request{}, 0, "handed back")
				continue
			}
			if !t.begin(s, t.handle, func() *bus.Delivery { return d }) { // what others have offered meanwhile has filled it
				s.handBack(d, wire.Request{}, 0, "handed back")
			}
		}
		if err != nil && ctx.Err() == nil {
			return err
		}
	}
	return nil
}

// notify leaves a value in a channel that has room for one: one is enough.
func notify(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// listen subscribes to ends of requests and of instances until leave is called, which is never nil. A role's gone is notified
// when an instance that has it has gone.
func (s *Stage) listen(ctx context.Context, roles []Role, gone []chan struct{}) (leave func(), err error) {
	var subs []*nats.Subscription
	leave = func() {
		for _, sub := range subs {
			_ = sub.Unsubscribe() // it ends with the connection at the latest
		}
		s.offers.open.end()
	}
	for subject, f := range map[string]func([]byte){
		wire.SubjectDone: s.done,
		wire.SubjectGone: func(data []byte) {
			var m wire.Gone
			if wire.Unmarshal(data, &m) != nil {
				return
			}
			for i, r := range roles {
				if wire.HasRole(m.Role, r.Name) {
					s.takeOver(ctx, r.Name)
					notify(gone[i])
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
	sub, err := s.Bus.Handle(wire.SubjectStats, func(_ []byte, respond func(any) error) {
		if err := respond(s.stats()); err != nil {
			s.Log.Warn("answering for stats", "error", err)
		}
	})
	if err != nil {
		return leave, fmt.Errorf("listening for questions for stats: %w", err)
	}
	subs = append(subs, sub)
	offers := func(data []byte, respond func(any) error) { s.offered(ctx, data, respond) }
	if sub, err = s.Bus.Handle(wire.SubjectOffer(s.ID), offers); err != nil {
		return leave, fmt.Errorf("listening for offers: %w", err)
	}
	subs = append(subs, sub)
	s.offers.open.begin(func() (subs []*nats.Subscription, err error) {
		for _, r := range roles {
			sub, err := s.Bus.HandleOne(wire.SubjectNodeOffer(s.HBM.Node(), r.Name), "instances", offers)
			if err != nil {
				return subs, fmt.Errorf("listening for offers: %w", err)
			}
			subs = append(subs, sub)
		}
		return subs, nil
	})
	return leave, nil
}

// done notes the end of a request or of a choice.
func (s *Stage) done(data []byte) {
	var m wire.Done
	if err := wire.Unmarshal(data, &m); err != nil {
		s.Log.Warn("ignoring a done event", "error", err)
		return
	}
	s.ended.add(&m) // first: what is taken from now on is not begun
	s.works.end(&m)
}

// deadWait is the delay of a dead instance's message: NATS may not have seen yet that the instance's connection has
// ended, and would send the message there.
const deadWait = 30 * time.Millisecond

// takeOver hands back to a role's queue what gone instances had claimed, so that it comes to a live one at once and not
// after AckWait. The HMM gives each orphan to one caller.
func (s *Stage) takeOver(ctx context.Context, role string) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	orphans, err := s.HBM.Orphans(ctx, role)
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

// MetricsAt says where /metrics is served, if Config.Metrics has left that open. It is called before Serve.
func (s *Stage) MetricsAt(address string) { s.address = address }

func (s *Stage) heartbeat() wire.Instance {
	beat := wire.Instance{
		ID: s.ID, Name: s.Name, Role: s.Role, Node: s.HBM.Node(), PID: os.Getpid(), NPUs: s.HBM.NPUs(), Ready: s.ready.Load(), Standby: s.standsBy(),
		Model: s.Model.Name, Digest: hex.EncodeToString(s.Model.Digest[:]), Kernels: s.Kernels(),
		Running: s.load.running(), Metrics: s.address, Paced: s.profile(),
	}
	_, beat.Epoch = s.changes.current()
	beat.Changing = s.changes.underWay()
	paced := s.pacing()
	beat.Busy, beat.Behind = paced.busy.Seconds(), paced.behind.Seconds()
	return beat
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
