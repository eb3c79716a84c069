package hmm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/wire"
)

// Handles name nodes, so of two HMMs with one name each would be asked for what the other one has given out. Who starts one looks whether
// the name is free, but cannot see one that starts in the same moment, nor any while NATS is away. So each looks again from time to time
// who else answers to its name, and the one that has been there for the shorter time ends.

// ErrName is returned by Serve when another HMM, which has been there for longer, has the node's name.
var ErrName = errors.New("another HMM on this NATS has the name of this node")

// subjectName is where HMMs that call their node so say since when.
func subjectName(node string) string { return "trireme.hmm." + node + ".name" }

// bearer is who has a name.
type bearer struct {
	_msgpack struct{} `msgpack:",as_array"` //lint:ignore U1000 read by the msgpack library

	Process string        // a different one for each daemon
	Up      time.Duration // since it began
}

const (
	nameEvery = 10 * time.Second       // between two looks
	nameWait  = 500 * time.Millisecond // for answers
	nameTie   = time.Second            // lifetimes that differ by less are alike, as answers take a while
)

// yields reports whether a daemon ends because of another one.
func (b bearer) yields(to bearer) bool {
	if apart := to.Up - b.Up; apart > nameTie || apart < -nameTie {
		return apart > 0
	}
	return to.Process < b.Process
}

func (d *Daemon) bearer() bearer { return bearer{Process: d.id, Up: time.Since(d.began)} }

func (d *Daemon) onName(m *nats.Msg) {
	data, err := wire.Marshal(d.bearer())
	if err == nil {
		err = m.Respond(data)
	}
	if err != nil {
		d.log.Warn("answering for the name", "error", err)
	}
}

// keepName returns ErrName when another HMM keeps the name, or nil when ctx ends.
func (d *Daemon) keepName(ctx context.Context) error {
	every := time.NewTicker(d.cfg.NameEvery)
	defer every.Stop()
	for {
		switch other, err := d.namesake(ctx); {
		case err != nil:
			d.log.Debug("looking for HMMs of the same name", "error", err) // NATS is away: next time
		case other:
			return fmt.Errorf("%w, %s, and was there first: give this one another with --node", ErrName, d.cfg.Node)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-every.C:
		}
	}
}

// namesake reports whether another daemon that this one yields to answers to its name.
func (d *Daemon) namesake(ctx context.Context) (bool, error) {
	nc := d.cfg.NATS
	inbox := nc.NewRespInbox()
	sub, err := nc.SubscribeSync(inbox)
	if err != nil {
		return false, err
	}
	defer sub.Unsubscribe() //nolint:errcheck // it ends with the connection at the latest
	if err := nc.PublishRequest(subjectName(d.cfg.Node), inbox, nil); err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, nameWait)
	defer cancel()
	for {
		m, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			return false, nil // nobody else
		}
		var other bearer
		if err := wire.Unmarshal(m.Data, &other); err != nil || other.Process == d.id {
			continue
		}
		if d.bearer().yields(other) {
			return true, nil
		}
	}
}
