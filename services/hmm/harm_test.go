package hmm_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm"
)

// customer is a well-behaved client with an NPU of its own. It works all the time and fails the test when anything that
// it asks for is refused or comes back changed.
type customer struct {
	*hbm.Client
	rounds atomic.Int64
	ended  chan struct{}
}

func newCustomer(t *testing.T, socket string) *customer {
	t.Helper()
	c := &customer{Client: dial(t, socket, hbm.Hello{Instance: "customer", NPUs: 1}), ended: make(chan struct{})}
	ctx, stop := context.WithCancel(context.Background())
	t.Cleanup(func() {
		stop()
		<-c.ended
	})
	go func() {
		defer close(c.ended)
		for ctx.Err() == nil {
			if err := c.round(); err != nil {
				t.Errorf("a client that did nothing wrong: %v", err)
				return
			}
			c.rounds.Add(1)
		}
	}()
	return c
}

// round is a request's life: claimed, in host memory and on the NPU, sealed, read, ended.
func (c *customer) round() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // a call that hangs is not served
	defer cancel()
	r := ref(fmt.Sprint("customer-", c.rounds.Load()), 1)
	claim, err := c.Claim(ctx, hbm.Part{Request: r.Request, Attempt: 1, Stage: "decode"}, "")
	if err != nil {
		return err
	}
	objects, err := c.Alloc(ctx, hbm.Spec{Kind: mem.KindPixels, NPU: mem.HostNPU, Bytes: 2 * page}, kv(c.NPUs()[0], 3*page+1))
	if err != nil {
		return err
	}
	for i, o := range objects {
		fill(o, byte(int(c.rounds.Load())+i))
	}
	handles, err := c.Seal(ctx, r, objects...)
	if err != nil {
		return err
	}
	got, err := c.Attach(ctx, mem.ReadOnly, c.NPUs()[0], handles...)
	if err != nil {
		return err
	}
	for _, o := range got {
		if err := o.Verify(); err != nil {
			return err
		}
	}
	if !claim.Held() {
		return errors.New("the claim is lost")
	}
	return errors.Join(c.Free(ctx, append(objects, got...)...), c.End(ctx, r.Request))
}

// served waits until the customer has done more rounds: what is done to the HMM meanwhile does not keep it from that.
func (c *customer) served(t *testing.T) {
	t.Helper()
	from := c.rounds.Load()
	eventually(t, "the customer is served", func() bool { return c.rounds.Load() > from+10 || t.Failed() })
}

func TestGarbageHarmsNobody(t *testing.T) {
	d, socket := daemon(t)
	c := newCustomer(t, socket)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 200 {
		conn := raw(t, socket)
		if i%2 == 0 { // every other after a good beginning
			send(t, conn, 1, protocol.OpHello, hello(protocol.Version))
			if _, failure := answer(t, conn); failure != nil {
				t.Fatal(failure)
			}
		}
		noise := make([]byte, 1+r.IntN(20_000))
		for j := range noise {
			noise[j] = byte(r.Uint32())
		}
		if i%3 == 0 { // as long as its frame says
			noise = append([]byte{0, 0, byte(len(noise) >> 8), byte(len(noise))}, noise...)
		}
		_, _ = conn.Write(noise) // may be refused half way
		must(t, conn.Close())
		if i%50 == 0 {
			c.served(t)
		}
	}
	c.served(t)
	eventually(t, "their connections are gone", func() bool { return d.Stats().Connections == 1 })
}

// TestAnothersObject asks, in every way, for an object of another tenant: its name is easy to guess, its capability not.
func TestAnothersObject(t *testing.T) {
	d, socket := daemon(t)
	c := newCustomer(t, socket)
	owner := dial(t, socket, hbm.Hello{Instance: "owner", NPUs: 1})
	secret := alloc(t, owner, kv(owner.NPUs()[0], 2*page))[0]
	fill(secret, 9)
	claim, err := owner.Claim(t.Context(), decodePart("theirs", 1, 0), "")
	must(t, err)
	h := secret.Handle()
	name := protocol.Object{ID: h.Object, Generation: h.Generation}

	conn := raw(t, socket)
	send(t, conn, 1, protocol.OpHello, hello(protocol.Version))
	if _, failure := answer(t, conn); failure != nil {
		t.Fatal(failure)
	}
	id := uint64(1)
	refused := func(what string, op protocol.Op, body any, want error) {
		t.Helper()
		id++
		send(t, conn, id, op, body)
		if got, failure := answer(t, conn); got != id || !errors.Is(failure, want) {
			t.Errorf("%s: answer %d, %v; want %v", what, got, failure, want)
		}
	}
	r := rand.New(rand.NewPCG(3, 4))
	for i := range 100 {
		forged := h
		forged.Capability = make([]byte, 16)
		for j := range forged.Capability {
			forged.Capability[j] = byte(r.Uint32())
		}
		if i == 0 {
			forged.Capability = nil
		}
		access := mem.Access(i % 2)
		refused("a guessed capability", protocol.OpAttach, protocol.Attach{Access: access, NPU: -1, Handles: []mem.Handle{forged}}, mem.ErrDenied)
	}
	ours := ref("ours", 1)
	refused("free", protocol.OpFree, []protocol.Object{name}, mem.ErrInvalid)
	refused("keep", protocol.OpKeep, protocol.Keep{Ref: ours, Objects: []protocol.Object{name}}, mem.ErrInvalid)
	refused("seal", protocol.OpSeal, protocol.Seal{Ref: ours, Items: []protocol.Sealing{{Object: name, CRC: 1}}}, mem.ErrInvalid)
	refused("forget", protocol.OpForget, []protocol.Object{name}, mem.ErrInvalid)
	key := protocol.Key{1}
	refused("cache", protocol.OpCacheBlocks, protocol.CacheBlocks{
		Slabs: []protocol.Object{name}, Hashes: protocol.PackKeys([]protocol.Key{key}), Blocks: protocol.PackBlocks([]protocol.Block{{}}),
	}, mem.ErrInvalid)
	refused("publish", protocol.OpPublishMM, protocol.PublishMM{Key: key, Ticket: 1, Object: name}, mem.ErrInvalid)
	refused("unclaim", protocol.OpUnclaim, protocol.Unclaim{Part: decodePart("theirs", 1, 0), Generation: claim.Generation()}, mem.ErrFenced)
	refused("memory of their NPU", protocol.OpAlloc, []protocol.Spec{kv(owner.NPUs()[0], page)}, mem.ErrDenied)
	mine := h // with a capability, but booked where the taker has nothing to say
	refused("booking to their NPU", protocol.OpAttach, protocol.Attach{NPU: c.NPUs()[0], Handles: []mem.Handle{mine}}, mem.ErrDenied)
	c.served(t)
	for i, b := range secret.Bytes() {
		if b != 9+byte(i*7) {
			t.Fatalf("byte %d changed", i)
		}
	}
	if !claim.Held() || secret.Handle().Sealed {
		t.Error("the owner has lost something")
	}
	if u := d.Stats().Memory[1+owner.NPUs()[0]].Kinds["kv"]; u.Used != 2*page {
		t.Errorf("the owner's account: %+v", u)
	}
}

// TestNeverFrees has a process take all memory and claims that it can get, and keep them: it gets a typed error with the
// sizes, others go on, and when it dies all is free again.
func TestNeverFrees(t *testing.T) {
	d, socket := daemon(t, func(c *hmm.Config) { c.NPUs, c.Claims = 3, 64 })
	c := newCustomer(t, socket)
	owner := dial(t, socket, hbm.Hello{Instance: "owner", NPUs: 1})
	hog, said := start(t, "hog", socket)
	own := fmt.Sprint(said.NPUs[0])
	for i, want := range [][]string{
		{"65536 bytes of host memory wanted", `"child" holds 3145728 and may hold 3145728 of 4194304`, mem.ErrExhausted.Error()},
		{`NPU 0 is granted to "customer"`, mem.ErrDenied.Error()},
		{`NPU 1 is granted to "owner"`, mem.ErrDenied.Error()},
		{`"child" has 48 claims, as many as one may have of 64`, mem.ErrExhausted.Error()},
	} {
		for _, w := range want {
			if !strings.Contains(said.Refusals[i], w) {
				t.Errorf("refusal %q does not say %q", said.Refusals[i], w)
			}
		}
	}
	if own != "2" {
		t.Fatalf("the hog has NPU %s", own)
	}
	c.served(t)
	free(t, owner, alloc(t, owner, kv(owner.NPUs()[0], 64*page))...) // all of its own
	for range 5 {
		works := dial(t, socket, hbm.Hello{Instance: "another"})
		free(t, works, alloc(t, works, hbm.Spec{Kind: mem.KindPixels, NPU: mem.HostNPU, Bytes: 10 * page})...)
		must(t, works.Close())
	}
	c.served(t)
	kill(t, hog)
	eventually(t, "what the hog had is free", func() bool {
		s := d.Stats()
		return s.Memory[0].Kinds["pixels"].Used <= 2*page && s.Memory[0].Free >= 62*page
	})
	c.served(t)
}

// TestRequestThatNeverEnds: what a client keeps for a request of which nobody hears again is free after its deadline.
func TestRequestThatNeverEnds(t *testing.T) {
	d, socket := daemon(t, func(c *hmm.Config) { c.Margin = time.Millisecond })
	c := newCustomer(t, socket)
	careless := dial(t, socket, hbm.Hello{Instance: "careless"})
	for i := range 30 {
		o := alloc(t, careless, hbm.Spec{Kind: mem.KindKV, NPU: 1, Bytes: 2 * page, Ref: hbm.Ref{
			Request: fmt.Sprint("lost-", i), Attempt: 1, Left: 50 * time.Millisecond,
		}})
		free(t, careless, o...)
	}
	eventually(t, "NPU 1 is free", func() bool { return d.Stats().Memory[2].Free == 64*page })
	c.served(t)
}

// TestThousandConnections opens them all at once and keeps them: some say hello, most nothing.
func TestThousandConnections(t *testing.T) {
	d, socket := daemon(t, func(c *hmm.Config) { c.Connections = 40 })
	c := newCustomer(t, socket)
	taken, refused := 0, 0
	var open []net.Conn
	for i := range 1000 {
		conn := raw(t, socket)
		open = append(open, conn)
		if i < 10 {
			send(t, conn, 1, protocol.OpHello, hello(protocol.Version))
			if _, failure := answer(t, conn); failure != nil {
				t.Fatalf("connection %d: %v", i, failure)
			}
			taken++
			continue
		}
		if i < 19 {
			continue // nothing is said
		}
		if _, failure := answer(t, conn); errors.Is(failure, mem.ErrExhausted) && strings.Contains(failure.Error(), "20 connections") {
			refused++
		}
	}
	if refused != 981 {
		t.Errorf("%d connections refused, want 981", refused)
	}
	_, err := hbm.Dial(t.Context(), socket, hbm.Hello{Instance: "late", Role: "decode"})
	wantErr(t, err, mem.ErrExhausted)
	c.served(t)
	other, said := start(t, "idle", socket) // of another process there is room
	if len(said.NPUs) != 1 {
		t.Errorf("another process has NPUs %v", said.NPUs)
	}
	if s := d.Stats(); s.Connections != taken+2 {
		t.Errorf("%d connections, want %d", s.Connections, taken+2)
	}
	c.served(t)
	kill(t, other)
	for _, conn := range open {
		must(t, conn.Close())
	}
	// A process that hangs up without a word counts as long as it may have maps, but its silent connections do not.
	eventually(t, "there is room for those who never said hello", func() bool {
		late, err := hbm.Dial(t.Context(), socket, hbm.Hello{Instance: "late", Role: "decode"})
		if err != nil {
			return false
		}
		must(t, late.Close())
		return true
	})
}
