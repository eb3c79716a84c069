// Package hmm is the HBM management module: the daemon of one node that owns all device memory there. It hands out
// extents of memfds to clients on a Unix socket (shared/hbm is the client, PROTOCOL.md the protocol), keeps the books of
// holds, claims and budgets (hmm/ledger), and takes back what nobody holds. It never computes, and maps the memory that
// it gives out only while it copies it from or to another node (shared/transfer).
package hmm

import (
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

// DefaultReserve is the Config.Reserve of 0.
const DefaultReserve = 10 * time.Second

// Config is what a daemon is made from.
type Config struct {
	Socket    string // path of the Unix socket to listen on, at most 107 bytes; its folder must be there
	Node      string // id of the node: letters, digits, - and _
	NPUs      int    // host NPUs of the node; 0 for a node with host memory only
	NPUBytes  int64  // device memory of each NPU, at least a page of 64 KiB
	HostBytes int64  // memory for pictures and long prompts, at least a page
	PerNPU    bool   // each NPU is a memory domain of its own, with its own memfd; else all NPUs are one domain

	// NATS, if not nil, brings the ends of requests, takes gone instances and asks for stats. Owned by the caller.
	NATS *nats.Conn
	// OnGone, if not nil, is called after an instance's connection ended and its claims became orphans. It must not
	// block for long. NATS is told besides.
	OnGone func(wire.Gone)

	// Peers, if not nil, lets objects be pulled from and by other nodes.
	Peers *Peers

	// What the caches may keep on each NPU though nobody holds it; whoever allocates is given its room all the same.
	MMCache int64 // bytes of MM objects; 0: a quarter of NPUBytes, negative: no cache
	KVCache int64 // bytes of KV slabs; 0: half of NPUBytes, negative: no cache

	// Weights is the most bytes of weights in each memory domain, beside what its NPUs have; 0: half of the machine's memory,
	// for all domains together.
	Weights int64

	// Ready is memory of each NPU that is taken from the system and touched before anybody wants it, and kept beside what is in use, up to
	// what the domain may have and as long as a sixteenth of the machine's memory is free; 0: none. An accelerator has all of its memory from
	// the start; that of a host comes when it is touched first, at 0.4 to 4 GB/s.
	Ready int64

	CacheBytes   int64         // freed memory kept for reuse, of the host and of each memory domain, which may keep what is to be Ready, too; 0: 256 MiB, negative: none
	Connections  int           // most clients at a time; 0: 256
	Claims       int           // most claims at a time; 0: 65536
	Margin       time.Duration // that holds outlive their request's deadline; 0: 10 s
	Tombstone    time.Duration // that an ended request is remembered at least; 0: 10 min
	Reserve      time.Duration // that NPUs of a named instance are kept for its name after its end; 0: DefaultReserve, negative: not at all
	WriteTimeout time.Duration // after which a client that does not read is dropped; 0: 10 s
	NameEvery    time.Duration // between two looks for another HMM that has the node's name; 0: 10 s
}

const (
	defaultCacheBytes   = 256 << 20
	defaultConnections  = 256
	defaultClaims       = 64 << 10
	defaultMargin       = 10 * time.Second
	defaultTombstone    = 10 * time.Minute
	defaultWriteTimeout = 10 * time.Second

	maxTombstones   = 64 << 10
	maxRequests     = 64 << 10         // that one client named first and that have not ended
	unknownDeadline = time.Hour        // of requests whose deadline nobody told
	helloTimeout    = 10 * time.Second // for a client to say hello
	npuWait         = 2 * time.Second  // for NPUs of an instance whose connection has ended to become free
	maxAllocs       = 8                // of one client at a time
	maxPulls        = 8                // of the objects of one Attach at a time: small ones take a round trip each
	maxFinds        = 64               // questions for MM objects or weights of one client that wait at a time
	maxFindWait     = time.Minute      // for somebody else to make an MM object or a weight set
	addressRoom     = 2                // bytes of addresses a byte of memory: room against fragmentation
	maxDomains      = 128              // a welcome carries a descriptor for each, and at most 253 (SCM_MAX_FD)
)

var validNode = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

func (c Config) withDefaults() Config {
	if c.CacheBytes == 0 {
		c.CacheBytes = defaultCacheBytes
	}
	c.CacheBytes = max(c.CacheBytes, 0)
	if c.Connections == 0 {
		c.Connections = defaultConnections
	}
	if c.Claims == 0 {
		c.Claims = defaultClaims
	}
	if c.Margin == 0 {
		c.Margin = defaultMargin
	}
	if c.Tombstone == 0 {
		c.Tombstone = defaultTombstone
	}
	if c.Reserve == 0 {
		c.Reserve = DefaultReserve
	}
	if c.WriteTimeout == 0 {
		c.WriteTimeout = defaultWriteTimeout
	}
	if c.NameEvery == 0 {
		c.NameEvery = nameEvery
	}
	if c.MMCache == 0 {
		c.MMCache = c.NPUBytes / 4
	}
	if c.KVCache == 0 {
		c.KVCache = c.NPUBytes / 2
	}
	c.MMCache = max(c.MMCache, 0)
	c.KVCache = max(c.KVCache, 0)
	if c.Weights == 0 {
		domains := 1
		if c.PerNPU {
			domains = c.NPUs
		}
		c.Weights = DefaultWeights(domains)
	}
	c.Weights -= c.Weights % mem.HostPage
	c.NPUBytes -= c.NPUBytes % mem.HostPage
	c.HostBytes -= c.HostBytes % mem.HostPage
	return c
}

// Validate reports everything that is wrong with the configuration.
func (c Config) Validate() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Socket == "" || len(c.Socket) > 107 { // sizeof(sockaddr_un.sun_path)-1, unix(7)
		wrong("socket path %q must have 1 to 107 bytes", c.Socket)
	}
	if !validNode.MatchString(c.Node) {
		wrong("node %q must be 1 to 64 letters, digits, - or _", c.Node)
	}
	if c.NPUs < 0 || c.NPUs > 1024 {
		wrong("%d NPUs, must be 0 to 1024", c.NPUs)
	}
	if c.PerNPU && c.NPUs > maxDomains {
		wrong("%d NPUs that are a memory domain each, must be at most %d", c.NPUs, maxDomains)
	}
	if c.NPUs > 0 && (c.NPUBytes < mem.HostPage || c.NPUBytes > 1<<44) {
		wrong("%d bytes of each NPU, must be %d to %d", c.NPUBytes, mem.HostPage, int64(1)<<44)
	}
	if c.HostBytes < mem.HostPage || c.HostBytes > 1<<44 {
		wrong("%d bytes of host memory, must be %d to %d", c.HostBytes, mem.HostPage, int64(1)<<44)
	}
	if c.Weights < 0 || c.Weights > 1<<44 {
		wrong("%d bytes of weights, must be 0 to %d", c.Weights, int64(1)<<44)
	}
	if c.Ready < 0 || c.Ready > 1<<44 {
		wrong("%d bytes of ready memory, must be 0 to %d", c.Ready, int64(1)<<44)
	}
	if c.Connections < 0 || c.Claims < 0 || c.Margin < 0 || c.Tombstone < 0 || c.WriteTimeout < 0 {
		wrong("limits and times must not be negative")
	}
	return errors.Join(errs...)
}
