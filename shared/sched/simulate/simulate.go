// Package simulate plays a load on a fleet of encode, prefill and decode instances, and on what changes it: a discrete-event simulator
// without a clock, a goroutine or a device. The same configuration, load and seed give the same result to the bit.
//
// What the services decide with is not copied but used: a sched.Queue orders the entrance and prompts, sched.Load says who takes a
// message, sched.Step bounds each step, sched.Seats chooses the NPU of a sequence, and what is known of the fleet is an
// autoscale.View as services/scaler makes it, as old and as coarse. What NPUs do takes the time that Costs say.
//
// Modelled: the gateway's line with its places and KV credits, the three queues, pictures in pieces between steps, chunked prefill, steps
// of all NPUs of an instance together, memory for KV, and changes of the fleet with the time they take. Not modelled: caches of prompts
// and pictures, several gateways or nodes that differ, faults, offers between instances, and everything a processor does beside NPUs,
// which Config.Front, Look and Hop stand for.
//
// All times are durations since the beginning of the simulation.
package simulate

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/autoscale"
)

// ErrConfig is wrapped by errors of New and Run for what cannot be simulated.
var ErrConfig = errors.New("this cannot be simulated")

// Costs say how long an NPU is busy. All results are at least 0.
type Costs interface {
	// Encode is a picture of so many multimodal tokens, on one NPU.
	Encode(tokens int) time.Duration
	// Step is an NPU's part of a step.
	Step(Work) time.Duration
	// Copy is the keys and values of so many tokens on their way between two instances; 0: they need not be copied.
	Copy(tokens int) time.Duration
}

// Work is what an NPU has in a step, as kernel.Work has it.
type Work struct {
	Prompt   int // new tokens of prompts
	Visual   int // of these, of pictures
	Pairs    int // of a prompt's new token and one that it attends to, itself included
	Decoding int // sequences that take one more token
	Context  int // tokens that these attend to, all together
}

// Request is one of a load.
type Request struct {
	Arrive   time.Duration // at the gateway
	Pictures int
	Visual   int // multimodal tokens of each picture
	Prompt   int // tokens, those of pictures included
	Output   int // tokens of the answer, at least 1
}

// Instance is one that is there at the beginning.
type Instance struct {
	Name    string // unique; Changes name it so
	Node    string
	Roles   string // letters: E, P, D, EP, PD, EPD
	NPUs    int    // 0: a standby
	Replica bool   // its process can be stopped, and others like it started
	KV      int    // tokens for which each of its NPUs has KV memory; 0: as many as Config.KV says
}

// Controller changes the fleet.
type Controller interface {
	// Name is for reports.
	Name() string
	// Every is how often it is asked.
	Every() time.Duration
	// Decide says what to do now, and why in a few words; none: nothing. What cannot be done is not done, and noted (Result.Refused).
	Decide(v *autoscale.View) []Order
}

// Order is a change that a Controller wants.
type Order struct {
	autoscale.Change
	Why string
}

// Config is a fleet and what it is like.
type Config struct {
	Seed      uint64 // of delays of signals and of how long changes take; the load has its own
	Costs     Costs
	Instances []Instance
	Spare     map[string]int // NPUs that nobody has, by node

	Front  time.Duration // from the client to the gateway's line and its first token back: what no NPU does
	Look   time.Duration // likewise, more of it for a request with pictures: they are read and prepared
	Hop    time.Duration // from one stage to the next
	Pieces int           // that a picture is computed in, between steps; 0: 7, as of the bundled model
	KV     int           // tokens for which an NPU has KV memory; 0: any number

	Rows       int // most prompt tokens of a step and NPU; 0: 512, the services' default
	StepTokens int // most tokens of a step of an NPU in which prompts are beside sequences that decode; 0: 128, likewise

	Ahead int           // requests without first token that are let in, for each NPU that encodes or computes prompts; 0: 32, the gateway's default
	Wait  time.Duration // longest wait in the gateway's line until a request is refused; 0: it waits for ever
	Order sched.Policy  // of the line
	Aims  sched.Targets // by which the line is ordered under SLO, late ones last; zero: none, as gateways have it by default

	Targets sched.Targets // by which requests are judged
	Misses  int           // a run ends at once when so many requests are known to miss them; 0: it does not
	Control Controller    // nil: nothing is changed
	Changes map[autoscale.Action]time.Duration
	Jitter  float64          // part by which a change may take longer or shorter
	Drag    float64          // how many times as long steps of an instance take while it prepares a change; below 1: 1
	Lag     [2]time.Duration // least and most age of signals
	Lost    float64          // chance that an instance's word is missing in a View
}

// DefaultChanges is what changes take: what the policy of the scaler expects.
func DefaultChanges() map[autoscale.Action]time.Duration {
	all := map[autoscale.Action]time.Duration{}
	for a, c := range autoscale.Default().Costs {
		all[a] = c.Time
	}
	return all
}

// The limits of instances, as the services have them by default.
const (
	Rows       = 512 // most prompt tokens of a step and NPU (services/prefill)
	StepTokens = 128 // with Blocks and Least of mixed as stage.MixedDefault
	Sequences  = 256 // on an NPU (services/decoder)
	promptSeqs = 32  // prompts in work on an NPU (services/prefill)
	patience   = 30 * time.Second
)

// mixed bounds steps with prompts beside sequences that decode.
func (c *Config) mixed() sched.Mixed {
	return sched.Mixed{Tokens: c.StepTokens, Blocks: 1 << 14, Least: 16}
}

// Fleet is a simulation. New makes one; Run plays it, once.
type Fleet struct {
	cfg    Config
	now    time.Duration
	events events
	rand   *rand.Rand
	end    time.Duration // of the load: changes and NPUs count until then

	line      line
	queues    [autoscale.Stages][]*request
	instances []*instance
	spare     map[string][]int
	started   int // instances so far, for their names
	given     uint64
	ops       []*operation
	served    stages // at the beginning
	open      int    // requests that have not ended
	signals   signals
	result    Result
	used      time.Duration // when NPUs were counted last
}

// New makes a fleet with nothing to do.
func New(cfg Config) (*Fleet, error) {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrConfig, fmt.Sprintf(format, args...))
	}
	if cfg.Costs == nil {
		return nil, bad("nothing says how long work takes")
	}
	if cfg.Pieces == 0 {
		cfg.Pieces = 7
	}
	if cfg.Ahead == 0 {
		cfg.Ahead = 32
	}
	if cfg.Rows == 0 {
		cfg.Rows = Rows
	}
	if cfg.StepTokens == 0 {
		cfg.StepTokens = StepTokens
	}
	if cfg.Changes == nil {
		cfg.Changes = DefaultChanges()
	}
	cfg.Drag = max(1, cfg.Drag)
	if cfg.Jitter < 0 || cfg.Jitter >= 1 || cfg.Lost < 0 || cfg.Lost >= 1 || cfg.Lag[0] < 0 || cfg.Lag[1] < cfg.Lag[0] || cfg.KV < 0 || cfg.Rows < 1 || cfg.StepTokens < 1 || cfg.Misses < 0 {
		return nil, bad("jitter %g, lost %g, lag %v, KV %d, rows %d, step tokens %d, misses %d",
			cfg.Jitter, cfg.Lost, cfg.Lag, cfg.KV, cfg.Rows, cfg.StepTokens, cfg.Misses)
	}
	f := &Fleet{cfg: cfg, rand: rand.New(rand.NewPCG(cfg.Seed, 0x51)), spare: map[string][]int{}}
	f.line = newLine(f)
	f.signals = newSignals(f)
	next := map[string]int{}
	numbers := func(node string, n int) []int {
		all := make([]int, n)
		for i := range all {
			all[i] = next[node]
			next[node]++
		}
		return all
	}
	names := map[string]bool{}
	for _, i := range cfg.Instances {
		if i.Roles == "" || stagesOf(i.Roles) == 0 || names[i.Name] || i.NPUs < 0 || i.NPUs > most || i.KV < 0 {
			return nil, bad("instance %+v: a name of its own, roles of E, P and D, and 0 to %d NPUs", i, most)
		}
		names[i.Name] = true
		f.add(i, numbers(i.Node, i.NPUs))
		if i.NPUs > 0 {
			f.served |= stagesOf(i.Roles)
		}
	}
	if need := stagesOf("PD"); f.served&need != need {
		return nil, bad("prefill and decode have no NPU each")
	}
	for _, i := range cfg.Instances {
		f.spare[i.Node] = nil
	}
	for node, n := range cfg.Spare {
		f.spare[node] = numbers(node, n)
	}
	return f, nil
}

// Outcome is what became of a request.
type Outcome struct {
	Request
	Refused bool
	TTFT    time.Duration // from arrival, as of the client
	TPOT    time.Duration // mean between two tokens; 0: there was one
	E2E     time.Duration // from arrival to the last token
}

// Good reports whether it was served within targets.
func (o *Outcome) Good(t sched.Targets) bool {
	return !o.Refused && (t.TTFT == 0 || o.TTFT <= t.TTFT) && (t.TPOT == 0 || o.TPOT <= t.TPOT)
}

// Made is a change that was carried out.
type Made struct {
	Order
	At   time.Duration // when it was decided
	Took time.Duration // until it was complete
}

// Moment is the state of a second.
type Moment struct {
	At      time.Duration
	Arrived int                   // requests in the second before
	NPUs    [autoscale.Stages]int // by role; an NPU with several counts for each
	Held    int                   // NPUs that are not spare
	Queued  [autoscale.Stages]int // messages that nobody has taken
	Waiting int                   // requests in the line
	Active  [autoscale.Stages]int // in work
}

// Result is what came of a simulation.
type Result struct {
	Outcomes []Outcome // in order of arrival
	Made     []Made    // in order of time
	Refused  []string  // orders that could not be carried out, and why
	Timeline []Moment  // each second until the load has ended
	NPUTime  time.Duration
	Length   time.Duration // until all had ended, or the run was ended
	Steps    int           // computed
	Blind    int           // Views in which the demand or an instance was missing
	Missed   int           // requests that are known to have missed Config.Targets; all of them, unless the run was ended for these
	Used     []Used
}

// Used is how much of the time an instance that is there at the end has computed.
type Used struct {
	Roles string
	NPUs  int
	Busy  time.Duration // of all of them together, since each came
}

// Run plays a load, rising in Arrive, for at least so long, and until the last answer has ended.
func (f *Fleet) Run(load []Request, length time.Duration) (*Result, error) {
	if f.end != 0 {
		return nil, fmt.Errorf("%w twice", ErrConfig)
	}
	f.end = length
	last := time.Duration(0)
	f.result.Outcomes = make([]Outcome, len(load))
	room := f.cfg.KV
	for _, i := range f.instances {
		if i.kv > 0 && i.has(autoscale.Decode) && (room == 0 || i.kv < room) {
			room = i.kv
		}
	}
	for i := range load {
		r := &load[i]
		if r.Arrive < last || r.Pictures < 0 || r.Visual < 0 || r.Prompt < 1 || r.Output < 1 || r.Prompt < r.Pictures*r.Visual {
			return nil, fmt.Errorf("%w: request %d of the load: %+v", ErrConfig, i, *r)
		}
		if room > 0 && r.Prompt+r.Output > room {
			return nil, fmt.Errorf("%w: request %d has %d tokens, an NPU has memory for %d", ErrConfig, i, r.Prompt+r.Output, room)
		}
		if r.Pictures > 0 && f.served&stagesOf("E") == 0 {
			return nil, fmt.Errorf("%w: request %d has pictures, and no NPU encodes", ErrConfig, i)
		}
		last = r.Arrive
	}
	f.end = max(f.end, last)
	f.open = len(load)
	if len(load) > 0 {
		f.at(load[0].Arrive, func() { f.arrive(load, 0) })
	}
	f.at(0, f.tick)
	if c := f.cfg.Control; c != nil {
		f.at(c.Every(), f.ask)
	}
	for f.events.Len() > 0 && (f.open > 0 || f.now < f.end) && (f.cfg.Misses == 0 || f.result.Missed < f.cfg.Misses) {
		f.next()
	}
	f.count()
	for _, i := range f.instances {
		u := Used{Roles: i.roles, NPUs: i.width()}
		for _, n := range i.npus {
			if n != nil {
				u.Busy += n.busy
			}
		}
		f.result.Used = append(f.result.Used, u)
	}
	f.result.Length = f.now
	return &f.result, nil
}

// arrive brings request i, and sees to it that the next one comes.
func (f *Fleet) arrive(load []Request, i int) {
	if i+1 < len(load) {
		f.at(load[i+1].Arrive, func() { f.arrive(load, i+1) })
	}
	r := &request{Request: load[i], index: i, first: -1}
	f.result.Outcomes[i].Request = load[i]
	front := f.cfg.Front
	if r.Pictures > 0 {
		front += f.cfg.Look
	}
	f.after(front, func() { f.line.push(r) })
	f.signals.arrived(r)
}

// tick is each second, as long as the load lasts.
func (f *Fleet) tick() {
	f.result.Timeline = append(f.result.Timeline, f.moment())
	if f.now+time.Second <= f.end {
		f.after(time.Second, f.tick)
	}
}

func (f *Fleet) moment() Moment {
	m := Moment{At: f.now, Waiting: f.line.queue.Len(), Arrived: f.signals.lately}
	f.signals.lately = 0
	for s := range m.Queued {
		m.Queued[s] = len(f.queues[s])
	}
	for _, i := range f.instances {
		for s := range m.NPUs {
			if i.has(autoscale.Stage(s)) {
				m.NPUs[s] += i.width()
			}
		}
		m.Active[autoscale.Encode] += i.load.Pictures
		m.Active[autoscale.Prefill] += i.load.Prompts
		m.Active[autoscale.Decode] += i.load.Sequences
	}
	m.Held = f.held()
	return m
}

// held is how many NPUs somebody has, or is about to get.
func (f *Fleet) held() (n int) {
	for _, i := range f.instances {
		n += i.width()
	}
	for _, o := range f.ops {
		n += len(o.reserved)
	}
	return n
}

// count adds up the time of NPUs. It is to be called before their number changes.
func (f *Fleet) count() {
	if to := min(f.now, f.end); to > f.used {
		f.result.NPUTime += time.Duration(f.held()) * (to - f.used)
		f.used = to
	}
}

// miss takes note that a request misses its targets.
func (f *Fleet) miss(r *request) {
	if !r.missed {
		r.missed = true
		f.result.Missed++
	}
}

// ended takes note of the end of a request.
func (f *Fleet) ended(r *request, refused bool) {
	o := &f.result.Outcomes[r.index]
	o.Refused = refused
	f.open--
	if refused {
		f.miss(r)
		return
	}
	o.TTFT, o.E2E = r.first-r.Arrive, f.now-r.Arrive
	if r.Output > 1 {
		o.TPOT = (f.now - r.first) / time.Duration(r.Output-1)
	}
	if !o.Good(f.cfg.Targets) {
		f.miss(r)
	}
	f.signals.ended(r, o)
	f.line.release(r)
}
