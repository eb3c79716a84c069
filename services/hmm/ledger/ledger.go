// Package ledger is the HMM's book of who holds what: objects, holds, requests, claims, the budgets of the NPUs, and the
// caches of MM objects and KV blocks. It is a pure state machine: no I/O, no clock, no goroutine; the time is an argument, which never goes back, and what has
// to happen outside is read from Effects after every call. The daemon (services/hmm) makes one call at a time.
package ledger

import (
	"crypto/hmac"
	"crypto/sha256"
	"fmt"
	"hash"
	"time"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/page"
	"trireme.dev/shared/wire"
)

// Config is what a ledger is made from.
type Config struct {
	Node   string
	Page   int64   // bytes, of every space
	Spaces []int64 // address room of each space in bytes; 0 is host memory
	Host   int64   // most bytes of host memory in use
	NPUs   []NPU
	Slots  int    // claims that can exist at once
	Key    []byte // for capabilities: secret, new at each start of the daemon
	First  uint64 // first generation; above all of earlier daemons on this node

	Board func(slot int) uint64 // reads what the holder of the claim in a slot has said: protocol.Progress; nil: nothing

	MMCache int64 // most bytes of MM objects, on each NPU, that only the cache keeps; 0: no cache
	KVCache int64 // the same of KV slabs
	Weights int64 // most bytes of weights in each memory domain, beside what its NPUs have

	Margin        time.Duration // holds outlive the deadline of their request by this much
	Tombstone     time.Duration // an ended request is remembered at least this long
	MaxRequests   int           // most requests that have not ended of those that one client named first; 0: any number
	MaxTombstones int           // most ended requests remembered, the longest-lived win
	Unknown       time.Duration // time to the deadline of a request whose deadline nobody told
	Reserve       time.Duration // NPUs of a named client are kept for its name after its end so long; 0: not at all
}

// NPU is the budget of one NPU.
type NPU struct {
	Bytes int64 // capacity
	Space int   // of its memory domain
}

// Conn names a client's connection.
type Conn uint64

// Effects is what the daemon has to do after a call, before it answers.
type Effects struct {
	Freed []mem.Extent // nobody holds it: drop its memory
	Slots []Slot       // claim table words to store, in order

	Settled []protocol.Key // of MM objects, and of sets with weights, that somebody was making: done or given up
}

// Slot is a word of the claim table and its new value; 0 is no claim's generation.
type Slot struct {
	Index      int
	Generation uint64
}

// Ledger is the state. Not safe for concurrent use.
type Ledger struct {
	cfg     Config
	spaces  []*page.Allocator
	budgets []*budget // host memory, then the NPUs: see account
	shared  []*budget // what the NPUs of a domain share, by space-1

	reserved []*budget // NPUs kept for a name, the first to lapse first

	mac     hash.Hash // HMAC with the key for capabilities
	objects map[uint64]*object
	freeIDs []uint64 // object ids used before
	gen     uint64   // last generation given

	conns    map[Conn]*conn
	lastConn Conn

	requests map[string]*request
	live     queue // requests not ended, by expiry
	ended    queue // tombstones, by expiry

	claims    map[claimKey]*claim
	freeSlots []int
	settled   map[string]bool // roles of which no instance has gone since Gone was last asked

	mm     map[protocol.Key]*object   // cached MM objects
	making map[protocol.Key]*encoding // those on their way
	prefix map[blockKey]blockAt       // cached KV blocks

	weights map[weightsKey]*weightSet

	rests uint64 // times that an object went to rest

	copies map[copyKey]*object // sealed objects' copies in other memory domains
	copied int64               // bytes, ever

	effects Effects
}

type conn struct {
	instance, role string
	name           string  // that its successor will have, too; "": none
	npus           []int   // in the order in which they were granted
	named          int     // requests, first by it, that have not ended
	gone           bool    // the connection has ended, but the process may still have maps: see Reap
	domains        []int   // by space: how many of npus are in it
	weights        []int64 // by space: bytes of weights that it holds
	most           int64   // that it had in use: see use.go
	objects        map[*object]bool
	claims         map[*claim]bool
}

// New returns an empty ledger.
func New(cfg Config) *Ledger {
	l := &Ledger{
		cfg: cfg, gen: cfg.First, mac: hmac.New(sha256.New, cfg.Key),
		objects: map[uint64]*object{}, conns: map[Conn]*conn{}, requests: map[string]*request{}, claims: map[claimKey]*claim{}, settled: map[string]bool{},
		mm: map[protocol.Key]*object{}, making: map[protocol.Key]*encoding{}, prefix: map[blockKey]blockAt{},
		copies:  map[copyKey]*object{},
		weights: map[weightsKey]*weightSet{},
	}
	for _, b := range cfg.Spaces {
		l.spaces = append(l.spaces, page.New(b/cfg.Page))
	}
	l.budgets = append(l.budgets, newBudget(mem.HostNPU, 0, cfg.Host))
	for i, n := range cfg.NPUs {
		l.budgets = append(l.budgets, newBudget(i, n.Space, n.Bytes))
	}
	for space := 1; space < len(cfg.Spaces); space++ {
		l.shared = append(l.shared, newBudget(mem.Shared(space), space, cfg.Weights))
	}
	for i := cfg.Slots - 1; i >= 0; i-- {
		l.freeSlots = append(l.freeSlots, i)
	}
	return l
}

// Effects returns what is to be done since the last call of Effects.
func (l *Ledger) Effects() Effects {
	e := l.effects
	l.effects = Effects{}
	return e
}

// Connect adds a client and grants it the NPUs that it wants: see Join. ErrDenied when another client has its name.
func (l *Ledger) Connect(now time.Time, h protocol.Hello) (Conn, []int, error) {
	if h.Instance == "" || h.Role == "" || h.Role == protocol.RoleGateway && h.NPUs+len(h.Want) > 0 {
		return 0, nil, fmt.Errorf("instance %q of role %q with %d NPUs: %w", h.Instance, h.Role, max(h.NPUs, len(h.Want)), mem.ErrInvalid)
	}
	if c := l.named(h.Name); c != nil {
		return 0, nil, fmt.Errorf("%q has the name %q on this node: end it, or give this one another with --name: %w", c.instance, h.Name, mem.ErrDenied)
	}
	npus, err := l.choose(now, h.Name, h.NPUs, h.Want)
	if err != nil {
		return 0, nil, err
	}
	c := &conn{
		instance: h.Instance, role: h.Role, name: h.Name, objects: map[*object]bool{}, claims: map[*claim]bool{},
		domains: make([]int, len(l.cfg.Spaces)), weights: make([]int64, len(l.cfg.Spaces)),
	}
	l.grant(c, npus)
	l.lastConn++
	l.conns[l.lastConn] = c
	return l.lastConn, npus, nil
}

// named is the client that has a name, connected or not reaped yet; nil when none has, and for no name.
func (l *Ledger) named(name string) *conn {
	for _, c := range l.conns {
		if name != "" && c.name == name {
			return c
		}
	}
	return nil
}

// Disconnect notes that a client's connection has ended, as it wanted: its claims become orphans. What it holds stays until
// Reap, because a mapping cannot be taken from a process that still runs.
func (l *Ledger) Disconnect(id Conn) {
	c := l.conn(id)
	c.gone = true
	for k := range c.claims {
		l.heard(k)
		k.owner = nil
		l.endEncoding(k.encoding)
	}
	c.claims = nil
	for _, role := range wire.Roles(c.role) {
		delete(l.settled, role)
	}
}

// Reap drops the holds and NPUs of a client that has no maps any more: it said so, or its process has exited. The requests that a
// gateway named first end soon.
func (l *Ledger) Reap(now time.Time, id Conn) {
	c := l.conn(id)
	if !c.gone {
		panic("BUG: Reap of a connected client")
	}
	if c.role == protocol.RoleGateway {
		l.abandon(now, c)
	}
	for _, o := range newestFirst(c.objects) {
		l.letGo(c, o)
	}
	l.reserve(now, c)
	delete(l.conns, id)
}

// Leaving reports whether some client is between Disconnect and Reap, so that its NPUs and memory are about to become free, or
// one has this name, which may be of a process that has just died.
func (l *Ledger) Leaving(name string) bool {
	for _, c := range l.conns {
		if c.gone {
			return true
		}
	}
	return l.named(name) != nil
}

func (l *Ledger) conn(id Conn) *conn {
	c, ok := l.conns[id]
	if !ok {
		panic(fmt.Sprintf("BUG: no connection %d", id))
	}
	return c
}

// next draws a generation: of objects and of claims, never the same twice, rising.
func (l *Ledger) next() uint64 {
	l.gen++
	return l.gen
}
