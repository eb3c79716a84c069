package hbm

import (
	"context"
	"fmt"
	"slices"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// Part names what a claim is for.
type Part = protocol.Part

// Orphan is a claim whose claimant's connection has ended: whoever gets it makes its message be delivered again by a nak
// to Reply.
type Orphan = protocol.Orphan

// Claim is the right to work on a part of a request until somebody claims it later.
type Claim struct {
	client     *Client
	part       Part
	slot       int
	generation uint64
	log        *mem.Handle
	strikes    int
	before     uint32 // furthest that anyone came before
	progress   protocol.Progress
}

// Claim takes a part for this instance, whoever had it: the generation always rises, and the one before is fenced.
// reply is the JetStream subject that acknowledges the message being worked on. mem.ErrEnded when the request is over or
// a later attempt is known.
func (c *Client) Claim(ctx context.Context, p Part, reply string) (*Claim, error) {
	var got protocol.Claimed
	undo := func() {
		_ = c.call(context.Background(), protocol.OpUnclaim, protocol.Unclaim{Part: p, Generation: got.Generation}, nil)
	}
	if err := c.acquire(ctx, protocol.OpClaim, protocol.Claim{Part: p, Reply: reply}, &got, undo); err != nil {
		return nil, err
	}
	if t := c.table.Load(); t != nil && (got.Slot < 0 || got.Slot >= t.Len()) {
		return nil, fmt.Errorf("claim in slot %d of %d: %w", got.Slot, t.Len(), mem.ErrInvalid)
	}
	return &Claim{client: c, part: p, slot: got.Slot, generation: got.Generation, log: got.Log, strikes: got.Strikes, before: got.Reached}, nil
}

// Part is what the claim is for.
func (k *Claim) Part() Part { return k.part }

// Generation is the claim's number; later claims have higher ones, of any part and after a restart of the HMM too.
func (k *Claim) Generation() uint64 { return k.generation }

// Log is the token log of the part's last writer, as it named it with Inherit; ok is false when there was none.
func (k *Claim) Log() (h mem.Handle, ok bool) {
	if k.log == nil {
		return mem.Handle{}, false
	}
	return *k.log, true
}

// Strikes is how many holders before have died, one after the other, while they ran the part and got no further than the one
// before: the part may be what kills them. Progress makes it 0.
func (k *Claim) Strikes() int { return k.strikes }

// Run notes that the part is being worked on from now on: if this process dies, that may be why. Rest notes that it waits.
// One goroutine at a time calls these and Progress. They cost a store, or nothing when nothing changes.
func (k *Claim) Run() {
	if !k.progress.Running {
		k.progress.Running = true
		k.tell()
	}
}

// Rest is the end of what Run has begun.
func (k *Claim) Rest() {
	if k.progress.Running {
		k.progress.Running = false
		k.tell()
	}
}

// Progress notes how far the work has come, above 0, in what the stage counts. Only what is further than every holder before
// counts against strikes; it reports whether it has just put an end to them.
func (k *Claim) Progress(reached uint32) (cleared bool) {
	if reached <= k.progress.Reached {
		return false
	}
	k.progress.Reached = reached
	k.tell()
	if k.strikes == 0 || reached <= k.before {
		return false
	}
	k.strikes = 0
	return true
}

// tell puts the progress where the HMM finds it if this process dies. What the slot's next holder has told may be overwritten by
// one that does not know yet that it has lost its claim; all that costs is a strike that is not counted, or one too many.
func (k *Claim) tell() {
	if k.client == nil {
		return // a zero Claim, in a test of what needs no HMM
	}
	if b := k.client.board.Load(); b != nil && k.Held() {
		b.Store(k.slot, k.progress.Word(k.generation))
	}
}

// Inherit makes this instance the writer of the sequence that the claim is for: its log and slabs get the request's hold,
// what is dropped loses it, and whoever claims the part later is told the log. All of it or nothing. Before it returns
// well nothing of the sequence may be written that another process knows of. mem.ErrFenced and mem.ErrEnded when the claim
// is held no more.
func (c *Client) Inherit(ctx context.Context, k *Claim, log *Object, slabs []*Object, drop []mem.Handle) error {
	keep := append([]*Object{log}, slabs...)
	if err := c.check(keep); err != nil {
		return fmt.Errorf("inheriting a sequence: %w", err)
	}
	v := protocol.Inherit{Part: k.part, Generation: k.generation, Keep: names(keep)}
	for _, h := range drop {
		if h.Node == c.node {
			v.Drop = append(v.Drop, nameOf(h))
		}
	}
	return c.call(ctx, protocol.OpInherit, v, nil)
}

// Held reports whether nobody has claimed the part later, the request has not ended, and the HMM is there. It costs two
// atomic loads: call it before every append, publish, ack and nak.
func (k *Claim) Held() bool {
	t := k.client.table.Load()
	return t != nil && t.Load(k.slot) == k.generation
}

// Unclaim gives a claim up after its work is done. One that is held no more is left alone, and the error says why:
// mem.ErrFenced when somebody has claimed the part later, mem.ErrEnded when the request or the attempt has ended.
func (c *Client) Unclaim(ctx context.Context, k *Claim) error {
	return c.call(ctx, protocol.OpUnclaim, protocol.Unclaim{Part: k.part, Generation: k.generation}, nil)
}

// Orphans takes the claims of a stage whose claimant's connection has ended, the oldest first, at most 1024. The HMM
// gives each to one caller and forgets it: a caller that dies before it has given the message back leaves that to the
// queue's own timeout.
func (c *Client) Orphans(ctx context.Context, stage string) ([]Orphan, error) {
	var found []Orphan
	err := c.call(ctx, protocol.OpOrphans, stage, &found)
	return found, err
}

// Gone reports whether an instance of a stage has gone since it was last asked. The HMM tells it to one caller: see
// Unclaimed.
func (c *Client) Gone(ctx context.Context, stage string) (gone bool, err error) {
	err = c.call(ctx, protocol.OpGone, stage, &gone)
	return gone, err
}

// Unclaimed returns those of the parts that nobody on this node has claimed. A message that was taken off the queue and
// stays unclaimed was taken by an instance that is no more.
func (c *Client) Unclaimed(ctx context.Context, parts []Part) ([]Part, error) {
	var found []Part
	for piece := range slices.Chunk(parts, protocol.MaxBatch) {
		var some []Part
		if err := c.call(ctx, protocol.OpUnclaimed, piece, &some); err != nil {
			return nil, err
		}
		found = append(found, some...)
	}
	return found, nil
}
