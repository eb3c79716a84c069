package bus

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/wire"
)

// Errors of layout records.
var (
	// ErrNoLayout is returned by Layout when there is no record.
	ErrNoLayout = errors.New("layout record is not there")
	// ErrLayoutChanged is returned by SwapLayout when the record is not the one that was to be replaced.
	ErrLayoutChanged = errors.New("layout record was changed by another one")
	// ErrUnclear is returned by SwapLayout when nobody can say whether the record is written: no answer came in time.
	ErrUnclear = errors.New("no answer whether the layout record is written")
)

// Layout reads an instance's layout record, and the revision to replace it by. It fails with ErrNoLayout when there is none, and with
// wire.ErrMalformed or wire.ErrVersion, and the revision, when it is damaged or of another version.
func (b *Bus) Layout(ctx context.Context, key string) (*wire.Layout, uint64, error) {
	var l *wire.Layout
	var revision uint64
	err := b.retry(ctx, func(ctx context.Context) error {
		entry, err := b.layouts.Get(ctx, key)
		if err != nil {
			return err
		}
		l, revision = new(wire.Layout), entry.Revision() // also of what cannot be read
		return wire.Unmarshal(entry.Value(), l)
	})
	switch {
	case errors.Is(err, jetstream.ErrKeyNotFound):
		return nil, 0, fmt.Errorf("reading layout record %s: %w", key, ErrNoLayout)
	case err != nil:
		return nil, revision, fmt.Errorf("reading layout record %s: %w", key, err)
	}
	return l, revision, nil
}

// SwapLayout stores an instance's layout record in the place of the one of a revision, 0: of none, and returns its revision. It
// tries until ctx ends. ErrLayoutChanged means that another record is there. ErrUnclear means that the record may be stored, or may yet
// be: SettleLayout over the same revision finds out. After any other error it is not stored.
func (b *Bus) SwapLayout(ctx context.Context, key string, l *wire.Layout, revision uint64) (uint64, error) {
	data, err := wire.Marshal(l)
	if err != nil {
		return 0, err
	}
	sent := false
	var stored uint64
	err = b.retry(ctx, func(ctx context.Context) error {
		first := !sent
		sent = true
		var err error
		stored, err = b.layouts.Update(ctx, key, data, revision)
		if first || !errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
			return err
		}
		// A try whose answer was lost may have stored it.
		entry, err := b.layouts.Get(ctx, key)
		if err != nil && !errors.Is(err, jetstream.ErrKeyNotFound) {
			return err
		}
		if err != nil || !bytes.Equal(entry.Value(), data) {
			return jetstream.ErrKeyRevisionMismatch
		}
		stored = entry.Revision()
		return nil
	})
	switch {
	case errors.Is(err, jetstream.ErrKeyRevisionMismatch):
		err = ErrLayoutChanged
	case err != nil && sent && !permanent(err):
		err = fmt.Errorf("%w: %w", ErrUnclear, err)
	}
	if err != nil {
		return 0, fmt.Errorf("storing layout record %s: %w", key, err)
	}
	return stored, nil
}

// SettleLayout decides about a SwapLayout that was unclear, or that is given up: it stores l over the same revision, or over
// a record in which the operation is pending. Of the two writes over one revision only one can succeed, whenever they arrive. It returns
// the record that then stands, which is l unless the swap has succeeded or somebody else has written, and tries until ctx ends.
func (b *Bus) SettleLayout(ctx context.Context, key string, l *wire.Layout, operation string, revision uint64) (*wire.Layout, uint64, error) {
	for {
		stored, err := b.SwapLayout(ctx, key, l, revision)
		if err == nil {
			return l, stored, nil
		}
		if !errors.Is(err, ErrLayoutChanged) {
			return nil, 0, err
		}
		now, at, err := b.Layout(ctx, key)
		switch {
		case errors.Is(err, ErrNoLayout): // the server has lost its store
			revision = 0
			continue
		case err != nil:
			return nil, 0, err
		case !now.Awaits(operation):
			return now, at, nil
		}
		revision = at
	}
}

// DeleteLayout removes a layout record; one that is not there is no error.
func (b *Bus) DeleteLayout(ctx context.Context, key string) error {
	err := b.retry(ctx, func(ctx context.Context) error { return purgeLayouts(ctx, b.js, key) })
	if err != nil {
		return fmt.Errorf("deleting layout record %s: %w", key, err)
	}
	return nil
}

// ForgetLayouts removes the layout records of all instances of a node, none of which may run. There need not be any, nor a place for them.
func ForgetLayouts(ctx context.Context, conn *nats.Conn, node string) error {
	js, err := jetstream.New(conn)
	if err == nil {
		err = purgeLayouts(ctx, js, wire.LayoutKey(node, "*"))
	}
	if err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
		return fmt.Errorf("deleting the layout records of node %s: %w", node, err)
	}
	return nil
}

func purgeLayouts(ctx context.Context, js jetstream.JetStream, keys string) error {
	stream, err := js.Stream(ctx, "KV_"+wire.BucketLayouts)
	if err != nil {
		return err
	}
	return stream.Purge(ctx, jetstream.WithPurgeSubject("$KV."+wire.BucketLayouts+"."+keys))
}
