package bus

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/wire"
)

// Announce keeps the heartbeat of an instance: it puts what f returns at once, every second, and within a tenth of a
// second after Ready, NPUs or another field but Running, Busy and Behind has changed. It blocks until ctx ends or the Bus is closed,
// then deletes the heartbeat (Close waits for that) and returns nil. A put that fails is logged and made up by the next
// one. f is called about ten times a second, from one goroutine; its ID and Role must not change. On a Bus that is closed
// already Announce fails with ErrClosed.
func (b *Bus) Announce(ctx context.Context, f func() wire.Instance) error {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return fmt.Errorf("announcing an instance: %w", ErrClosed)
	}
	b.wg.Add(1)
	b.mu.Unlock()
	defer b.wg.Done()
	beat := b.instanceTTL / 5
	tick := time.NewTicker(beat / 10)
	defer tick.Stop()
	var put wire.Instance
	var at time.Time
	failing := false
	for {
		now := f()
		same := now
		same.Running, same.Busy, same.Behind = put.Running, put.Busy, put.Behind
		if time.Since(at) >= beat || !reflect.DeepEqual(same, put) {
			err := b.putInstance(ctx, now)
			if err != nil && !failing && ctx.Err() == nil && b.ctx.Err() == nil {
				b.log.Warn("heartbeat failed; it is tried again", "error", err)
			}
			failing = err != nil
			put, at = now, time.Now()
		}
		select {
		case <-tick.C:
			continue
		case <-ctx.Done():
		case <-b.ctx.Done():
		}
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), tryTimeout)
		defer cancel()
		if err := b.instances.Purge(last, wire.InstanceKey(&now)); err != nil {
			b.log.Debug("heartbeat not deleted; it expires", "error", err)
		}
		return nil
	}
}

func (b *Bus) putInstance(ctx context.Context, i wire.Instance) error {
	data, err := json.Marshal(i)
	if err != nil {
		return fmt.Errorf("encoding heartbeat: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	if _, err := b.instances.Put(ctx, wire.InstanceKey(&i), data); err != nil {
		return fmt.Errorf("heartbeat of %s: %w", i.ID, err)
	}
	return nil
}

// Instances is a live view of all heartbeats. It is safe for concurrent use.
type Instances struct {
	ttl  time.Duration
	keys string // those watched, a pattern

	mu      sync.Mutex
	seen    map[string]sighting
	changed chan struct{}
}

type sighting struct {
	instance wire.Instance
	at       time.Time // of this process's monotonic clock
	revision uint64    // rises from heartbeat to heartbeat of all
}

// Instances watches the heartbeats until ctx ends or the Bus is closed. It returns once all that are there have been
// read, those too that are renewed meanwhile; a server that cannot be reached makes it wait until ctx ends.
func (b *Bus) Instances(ctx context.Context) (*Instances, error) { return b.view(ctx, ">") }

// Gateways watches the heartbeats of gateways only, as Instances does. It is for those of whom there are many: if each of
// them watched all others that would be most of what an idle fleet does.
func (b *Bus) Gateways(ctx context.Context) (*Instances, error) { return b.view(ctx, wire.GatewayKeys) }

// again is the time between two looks which heartbeats there are, while a view waits for those of them that it lacks.
const again = 100 * time.Millisecond

// view watches until it has had of each heartbeat that is there the one that was the latest when it began, or a newer one. That the watcher
// has read all values which there were at first (a nil entry) does not say so: one that was replaced meanwhile is not among them, and comes
// in its turn, behind those of others.
func (b *Bus) view(ctx context.Context, keys string) (_ *Instances, err error) {
	v := &Instances{ttl: b.instanceTTL, keys: keys, seen: map[string]sighting{}, changed: make(chan struct{})}
	epoch := b.connection()
	w, err := b.watch(ctx, keys)
	if err != nil {
		return nil, fmt.Errorf("watching heartbeats: %w", err)
	}
	defer func() {
		if err != nil {
			leave(w)
		}
	}()
	look := time.NewTicker(again) // what the view lacks may have expired
	defer look.Stop()
	had := map[string]bool{}  // keys of which the watcher has told
	var lacks map[string]bool // keys there are, without these; nil: not known yet
	for lacks == nil || len(lacks) > 0 {
		list := false
		select {
		case e, ok := <-w.Updates():
			if !ok {
				return nil, fmt.Errorf("watching heartbeats: %w", ErrClosed)
			}
			if e == nil {
				list = true
				break
			}
			v.take(e)
			had[e.Key()] = true
			delete(lacks, e.Key())
		case <-look.C:
			list = lacks != nil
		case <-ctx.Done():
			return nil, fmt.Errorf("watching heartbeats: %w", context.Cause(ctx))
		case <-b.ctx.Done():
			return nil, fmt.Errorf("watching heartbeats: %w", ErrClosed)
		case <-epoch.Done(): // what the server before has not sent will not come
			if b.ctx.Err() != nil {
				return nil, fmt.Errorf("watching heartbeats: %w", ErrClosed)
			}
			epoch = b.connection()
			leave(w)
			if w, err = b.watch(ctx, keys); err != nil {
				w = idle{}
				return nil, fmt.Errorf("watching heartbeats: %w", err)
			}
			clear(had)
			lacks = nil
		}
		if !list {
			continue
		}
		if lacks, err = b.instanceKeys(ctx, keys); err != nil {
			if b.ctx.Err() != nil {
				err = ErrClosed
			}
			return nil, fmt.Errorf("listing heartbeats: %w", err)
		}
		maps.DeleteFunc(lacks, func(key string, _ bool) bool { return had[key] })
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, fmt.Errorf("watching heartbeats: %w", ErrClosed)
	}
	b.wg.Go(func() { b.follow(ctx, v, w, epoch) })
	return v, nil
}

// instanceKeys are those of a pattern that the bucket has, as one look of the server's: none is missing because it is just replaced. Some may
// be of heartbeats that were deleted.
func (b *Bus) instanceKeys(ctx context.Context, pattern string) (map[string]bool, error) {
	const bucket = "$KV." + wire.BucketInstances + "."
	keys := map[string]bool{}
	err := b.retry(ctx, func(ctx context.Context) error {
		stream, err := b.js.Stream(ctx, "KV_"+wire.BucketInstances)
		if err != nil {
			return err
		}
		info, err := stream.Info(ctx, jetstream.WithSubjectFilter(bucket+pattern))
		if err != nil {
			return err
		}
		clear(keys)
		for subject := range info.State.Subjects {
			keys[strings.TrimPrefix(subject, bucket)] = true
		}
		return nil
	})
	return keys, err
}

func (b *Bus) watch(ctx context.Context, keys string) (w jetstream.KeyWatcher, err error) {
	// The watcher lives as long as the context it is made with, so no try has a timeout of its own.
	for wait := newPause(); ; {
		if w, err = b.instances.Watch(ctx, keys); err == nil || permanent(err) {
			return w, err
		}
		if wait.sleep(ctx) != nil {
			return nil, fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// leave ends a watcher. What it has not told yet is read, as the client would wait for ever with the next entry if there were no room for it.
func leave(w jetstream.KeyWatcher) {
	_ = w.Stop() // it ends with its connection, or context, at the latest
	for {
		select {
		case _, ok := <-w.Updates():
			if ok {
				continue
			}
		default:
		}
		return
	}
}

// follow is the goroutine of a view. After a reconnect it watches anew: what the old watch missed is read again, and
// what is no longer there expires.
func (b *Bus) follow(ctx context.Context, v *Instances, w jetstream.KeyWatcher, epoch context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(b.ctx, cancel)
	defer stop()
	tick := time.NewTicker(v.ttl / 10)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			leave(w)
			return
		case e, ok := <-w.Updates():
			if !ok { // stopped by its own connection's end; a reconnect follows
				w = idle{}
			} else if e != nil {
				v.take(e)
			}
		case now := <-tick.C:
			v.expire(now)
		case <-epoch.Done():
			if ctx.Err() != nil || b.ctx.Err() != nil { // at Close it ends, too, and a watcher made now would be left to the server
				leave(w)
				return
			}
			epoch = b.connection()
			leave(w)
			next, err := b.watch(ctx, v.keys)
			if err != nil {
				if ctx.Err() == nil {
					b.log.Error("watching heartbeats after a reconnect failed", "error", err)
				}
				next = idle{}
			}
			w = next
		}
	}
}

// idle is a watcher that sees nothing.
type idle struct{}

func (idle) Updates() <-chan jetstream.KeyValueEntry { return nil }
func (idle) Stop() error                             { return nil }
func (idle) Error() <-chan error                     { return nil }

func (v *Instances) take(e jetstream.KeyValueEntry) {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, id, _ := strings.Cut(e.Key(), ".")
	old, known := v.seen[id]
	if e.Operation() != jetstream.KeyValuePut {
		if known {
			delete(v.seen, id)
			v.announce()
		}
		return
	}
	var i wire.Instance
	if json.Unmarshal(e.Value(), &i) != nil || wire.InstanceKey(&i) != e.Key() {
		return // not a heartbeat of this program
	}
	v.seen[i.ID] = sighting{i, time.Now(), e.Revision()}
	if !known || !reflect.DeepEqual(old.instance, i) {
		v.announce()
	}
}

func (v *Instances) expire(now time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	n := len(v.seen)
	for id, s := range v.seen {
		if now.Sub(s.at) > v.ttl {
			delete(v.seen, id)
		}
	}
	if len(v.seen) != n {
		v.announce()
	}
}

// announce wakes those who wait for a change; v.mu is held.
func (v *Instances) announce() {
	close(v.changed)
	v.changed = make(chan struct{})
}

// Changed returns a channel that is closed at the next change. Take it before reading the view, so that none is missed.
func (v *Instances) Changed() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.changed
}

// All returns the instances that are alive, sorted by role and id. The slice belongs to the caller.
func (v *Instances) All() []wire.Instance {
	v.mu.Lock()
	defer v.mu.Unlock()
	all := make([]wire.Instance, 0, len(v.seen))
	for _, s := range v.seen {
		all = append(all, s.instance)
	}
	slices.SortFunc(all, func(a, b wire.Instance) int {
		return cmp.Or(cmp.Compare(a.Role, b.Role), cmp.Compare(a.ID, b.ID))
	})
	return all
}

// Named returns them without those that have a successor: of several with a node and a name the one that was heard of last, as the heartbeat
// of one that was killed stays for a while. It is for operators, who mean an instance by its name.
func (v *Instances) Named() []wire.Instance {
	all := v.All()
	v.mu.Lock()
	defer v.mu.Unlock()
	last := map[string]uint64{} // by key of the layout record, which the processes of a name have in common
	for _, s := range v.seen {
		last[s.instance.Record()] = max(last[s.instance.Record()], s.revision)
	}
	return slices.DeleteFunc(all, func(i wire.Instance) bool { return v.seen[i.ID].revision < last[i.Record()] })
}

// Alive reports whether an instance is alive.
func (v *Instances) Alive(id string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	_, ok := v.seen[id]
	return ok
}

// Node is the node of an instance that is alive, "" of any other.
func (v *Instances) Node(id string) string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.seen[id].instance.Node
}

// Role returns the instances that are alive and have a role, perhaps beside others, sorted by role and id.
func (v *Instances) Role(role string) []wire.Instance {
	return slices.DeleteFunc(v.All(), func(i wire.Instance) bool { return !wire.HasRole(i.Role, role) })
}
