package bus

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

// Errors of join records.
var (
	// ErrNoJoin is returned by MarkJoin when the record is not there: expired, or deleted as its attempt has ended.
	ErrNoJoin = errors.New("join record is not there")
	// ErrJoinExists is returned by CreateJoin when there is a record with other content under the key.
	ErrJoinExists = errors.New("join record exists")
)

// CreateJoin stores the join record of a request and attempt under its wire.JoinKey. Storing the same record again is
// no error; another one under the key is ErrJoinExists.
func (b *Bus) CreateJoin(ctx context.Context, key string, j *wire.Join) error {
	return b.CreateJoinWithin(ctx, 0, key, j)
}

// CreateJoinWithin is to CreateJoin as PublishWithin is to Publish.
func (b *Bus) CreateJoinWithin(ctx context.Context, patience time.Duration, key string, j *wire.Join) error {
	data, err := wire.Marshal(j)
	if err != nil {
		return err
	}
	err = b.retryWithin(ctx, patience, func(ctx context.Context) error {
		_, err := b.joins.Create(ctx, key, data)
		if !errors.Is(err, jetstream.ErrKeyExists) {
			return err
		}
		// A try whose answer was lost may have stored it.
		entry, err := b.joins.Get(ctx, key)
		if err != nil {
			return err
		}
		if !bytes.Equal(entry.Value(), data) {
			return ErrJoinExists
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("creating join record %s: %w", key, err)
	}
	return nil
}

// Join reads a join record. It fails with ErrNoJoin when there is none.
func (b *Bus) Join(ctx context.Context, key string) (*wire.Join, error) {
	j := new(wire.Join)
	err := b.retry(ctx, func(ctx context.Context) error {
		entry, err := b.joins.Get(ctx, key)
		if err != nil {
			return err
		}
		return wire.Unmarshal(entry.Value(), j)
	})
	switch {
	case errors.Is(err, jetstream.ErrKeyNotFound):
		return nil, fmt.Errorf("reading join record %s: %w", key, ErrNoJoin)
	case err != nil:
		return nil, fmt.Errorf("reading join record %s: %w", key, err)
	}
	return j, nil
}

// MarkJoin records that picture part of a request is encoded, in the MM object mm, which was a hit in the cache or not, and returns the record as it is
// then: it holds this mark, and every mark whose MarkJoin returned before this one was called. Of several calls for all
// parts at least one therefore sees the record complete; whoever does publishes the prefill message (under one msgID).
// Marking again replaces the handle. It fails with ErrNoJoin, and with wire.ErrMalformed for a part out of range.
func (b *Bus) MarkJoin(ctx context.Context, key string, part int, mm mem.Handle, hit bool) (*wire.Join, error) {
	var j *wire.Join
	err := b.retry(ctx, func(ctx context.Context) error {
		for {
			var err error
			if j, err = b.tryMark(ctx, key, part, mm, hit); !errors.Is(err, jetstream.ErrKeyRevisionMismatch) {
				return err
			}
			// Another mark came between; with the record as it now is this one goes on top.
		}
	})
	switch {
	case errors.Is(err, jetstream.ErrKeyNotFound):
		return nil, fmt.Errorf("marking picture %d in join record %s: %w", part, key, ErrNoJoin)
	case err != nil:
		return nil, fmt.Errorf("marking picture %d in join record %s: %w", part, key, err)
	}
	return j, nil
}

// tryMark is one turn of the compare-and-set; jetstream.ErrKeyRevisionMismatch means that another writer was faster.
func (b *Bus) tryMark(ctx context.Context, key string, part int, mm mem.Handle, hit bool) (*wire.Join, error) {
	entry, err := b.joins.Get(ctx, key)
	if err != nil {
		return nil, err
	}
	j := new(wire.Join)
	if err := wire.Unmarshal(entry.Value(), j); err != nil {
		return nil, err
	}
	if part < 0 || part >= len(j.Have) || len(j.Prefill.MM) != len(j.Have) {
		return nil, fmt.Errorf("part %d of %d, with room for %d handles: %w", part, len(j.Have), len(j.Prefill.MM), wire.ErrMalformed)
	}
	if j.Have[part] && reflect.DeepEqual(j.Prefill.MM[part], mm) {
		return j, nil
	}
	if hit && !j.Have[part] {
		j.Prefill.Hits++
	}
	j.Have[part], j.Prefill.MM[part] = true, mm
	data, err := wire.Marshal(j)
	if err != nil {
		return nil, err
	}
	if _, err := b.joins.Update(ctx, key, data, entry.Revision()); err != nil {
		return nil, err
	}
	return j, nil
}

// DeleteJoin removes a join record; one that is not there is no error. Unlike a bucket's own Delete it leaves no
// marker behind: there is a record for each request with a picture.
func (b *Bus) DeleteJoin(ctx context.Context, key string) error {
	subject := "$KV." + wire.BucketJoin + "." + key
	err := b.retry(ctx, func(ctx context.Context) error {
		return b.joinStream.Purge(ctx, jetstream.WithPurgeSubject(subject))
	})
	if err != nil {
		return fmt.Errorf("deleting join record %s: %w", key, err)
	}
	return nil
}

// JoinKeys lists the keys of all join records. It waits for a server that is away until ctx ends.
func (b *Bus) JoinKeys(ctx context.Context) ([]string, error) {
	prefix := "$KV." + wire.BucketJoin + "."
	var keys []string
	err := b.retry(ctx, func(ctx context.Context) error {
		info, err := b.joinStream.Info(ctx, jetstream.WithSubjectFilter(prefix+">"))
		if err != nil {
			return err
		}
		keys = keys[:0]
		for subject := range info.State.Subjects {
			keys = append(keys, strings.TrimPrefix(subject, prefix))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing join records: %w", err)
	}
	return keys, nil
}
