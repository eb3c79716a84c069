package bus

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/wire"
)

// Limits of what is kept of dead letters.
const (
	deadAge     = 24 * time.Hour
	deadLetters = 10_000 // of a kilobyte or two, without their requests; the oldest go first
	// deadRequests and leastRequests are the bytes of all requests: as many as the server has room for, between these.
	deadRequests  = 1 << 30
	leastRequests = 16 << 20

	deadChunk   = 32 << 10 // bytes of an object in one message
	deadPending = 8        // chunks on their way: what else the connection carries need not wait for more
)

// Errors of dead letters.
var (
	// ErrNoLetter is returned by Letter when there is none of that id: purged, expired, or never there.
	ErrNoLetter = errors.New("no such dead letter")
	// ErrNoRequest is returned by Request and Fetched for a letter without its request, or one whose objects are gone.
	ErrNoRequest = errors.New("the request of this dead letter is not kept")
	// ErrFull is returned by Bury when the store of requests is full: the letter is stored without.
	ErrFull = errors.New("the store of dead letters is full")
)

// NewDeadID makes the id of a dead letter: milliseconds since 1970 and five random characters, in base 36, so that ids sort by
// time until 2059.
func NewDeadID(now time.Time) string {
	const random = 36 * 36 * 36 * 36 * 36
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic("BUG: no random numbers: " + err.Error())
	}
	n := uint64(0)
	for _, x := range b {
		n = n<<8 | uint64(x)
	}
	return deadTime(now) + padded(strconv.FormatUint(n%random, 36), 5)
}

// deadTime is the beginning of the ids of a time.
func deadTime(t time.Time) string { return padded(strconv.FormatInt(t.UnixMilli(), 36), 8) }

func padded(number string, digits int) string {
	return strings.Repeat("0", max(0, digits-len(number))) + number
}

// Bury stores a dead letter with its ID, and its request if there is a body: the pictures in the order of l.Fetched. When only
// the letter could be stored it says so in l.Missing and returns ErrFull. The bucket of requests is the one place where
// picture bytes are on NATS.
func (b *Bus) Bury(ctx context.Context, l *wire.DeadLetter, body []byte, pictures [][]byte) error {
	err := b.bury(ctx, l, body, pictures)
	if err != nil {
		return fmt.Errorf("storing dead letter %s: %w", l.ID, err)
	}
	return nil
}

func (b *Bus) bury(ctx context.Context, l *wire.DeadLetter, body []byte, pictures [][]byte) error {
	if err := b.retry(ctx, b.ensureDead); err != nil {
		return err
	}
	var full error
	if body != nil {
		err := b.buryRequest(ctx, l, body, pictures)
		switch {
		case err == nil:
			l.Body = int64(len(body))
		case isFull(err):
			full = ErrFull
			l.Missing, l.Fetched = ErrFull.Error(), nil
		default:
			return err
		}
	}
	data, err := json.Marshal(l)
	if err != nil {
		return err
	}
	if len(data) > wire.MaxMessage && len(l.Fetched) > 0 { // a great many pictures: their URLs are in the body
		for i := range l.Fetched {
			l.Fetched[i].URL = ""
		}
		if data, err = json.Marshal(l); err != nil {
			return err
		}
	}
	subject := wire.SubjectDead(wire.DeadTenant(l.Tenant), l.ID)
	err = b.retry(ctx, func(ctx context.Context) error {
		_, err := b.js.Publish(ctx, subject, data, jetstream.WithMsgID(l.ID), jetstream.WithRetryAttempts(0))
		return err
	})
	if err != nil {
		b.dropRequest(l)
		return err
	}
	return full
}

// buryRequest stores the objects of a letter, all or none.
func (b *Bus) buryRequest(ctx context.Context, l *wire.DeadLetter, body []byte, pictures [][]byte) error {
	store, err := b.js.ObjectStore(ctx, wire.BucketDead)
	if err != nil {
		return err
	}
	put := func(name string, data []byte) error {
		if b.conn.IsReconnecting() {
			return errAway
		}
		_, err := store.Put(ctx, jetstream.ObjectMeta{Name: name, Opts: &jetstream.ObjectMetaOptions{ChunkSize: deadChunk}},
			&paced{data: bytes.NewReader(data), flush: func() error {
				try, cancel := context.WithTimeout(ctx, setupTimeout)
				defer cancel()
				return b.conn.FlushWithContext(try)
			}})
		return err
	}
	err = put(wire.DeadBody(l), body)
	for i, p := range pictures {
		if err == nil {
			err = put(wire.DeadFetched(l, i), p)
		}
	}
	if err != nil {
		b.dropRequest(l)
	}
	return err
}

// paced gives an object's bytes no faster than the server takes them.
type paced struct {
	data  *bytes.Reader
	reads int
	flush func() error
}

// Read implements io.Reader.
func (p *paced) Read(buf []byte) (int, error) {
	if p.reads++; p.reads%deadPending == 0 {
		if err := p.flush(); err != nil {
			return 0, err
		}
	}
	return p.data.Read(buf)
}

// dropRequest takes back what was stored of a request, as far as that is possible now; the rest expires.
func (b *Bus) dropRequest(l *wire.DeadLetter) {
	ctx, cancel := context.WithTimeout(context.Background(), setupTimeout)
	defer cancel()
	if err := b.deleteRequest(ctx, l); err != nil {
		b.log.Debug("objects of a dead letter are left until they expire", "letter", l.ID, "error", err)
	}
}

// deleteRequest deletes the objects of a letter that are there.
func (b *Bus) deleteRequest(ctx context.Context, l *wire.DeadLetter) error {
	store, err := b.js.ObjectStore(ctx, wire.BucketDead)
	if err != nil {
		return err
	}
	names := []string{wire.DeadBody(l)}
	for i := range l.Fetched {
		names = append(names, wire.DeadFetched(l, i))
	}
	for _, name := range names {
		if err := store.Delete(ctx, name); err != nil && !errors.Is(err, jetstream.ErrObjectNotFound) {
			return err
		}
	}
	return nil
}

// Answers of the server that has no room for more (nats-server errors.json).
const (
	storeFailed      = 10077 // JSStreamStoreFailedF: a limit of the stream
	storageExceeded  = 10047 // JSStorageResourcesExceededErr: of the server, for a new stream
	resourcesLacking = 10023 // JSInsufficientResourcesErr
)

func isFull(err error) bool {
	api := apiError(err)
	return api != nil && (api.ErrorCode == storeFailed || api.ErrorCode == storageExceeded || api.ErrorCode == resourcesLacking)
}

// ensureDead makes the stream and the bucket of dead letters if they are missing.
func (b *Bus) ensureDead(ctx context.Context) error {
	if _, err := b.js.Stream(ctx, wire.StreamDead); errors.Is(err, jetstream.ErrStreamNotFound) {
		copies, err := b.copies(ctx, wire.StreamDead)
		if err != nil {
			return err
		}
		if _, err = b.ensureStream(ctx, jetstream.StreamConfig{
			Name: wire.StreamDead, Description: "requests that failed for good", Subjects: []string{wire.SubjectDead("*", "*")},
			Storage: jetstream.FileStorage, Discard: jetstream.DiscardOld, Duplicates: dedupeWindow, Replicas: copies,
			MaxAge: deadAge, MaxMsgs: deadLetters, MaxMsgSize: wire.MaxMessage,
		}); err != nil {
			return fmt.Errorf("stream %s: %w", wire.StreamDead, err)
		}
	} else if err != nil {
		return err
	}
	if _, err := b.js.ObjectStore(ctx, wire.BucketDead); !errors.Is(err, jetstream.ErrBucketNotFound) {
		return err
	}
	copies, err := b.copies(ctx, "OBJ_"+wire.BucketDead)
	if err != nil {
		return err
	}
	for most := int64(deadRequests); ; most /= 2 {
		_, err = b.js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{
			Bucket: wire.BucketDead, Description: "bodies and pictures of dead letters", TTL: deadAge, MaxBytes: most,
			Storage: jetstream.FileStorage, Replicas: copies,
		})
		switch {
		case err == nil, errors.Is(err, jetstream.ErrBucketExists): // another gateway was faster
			return nil
		case !isFull(err) || most/2 < leastRequests:
			return fmt.Errorf("bucket %s: %w", wire.BucketDead, err)
		}
	}
}

// DeadCount is how many dead letters there are.
func (b *Bus) DeadCount(ctx context.Context) (n int, err error) {
	err = b.retry(ctx, func(ctx context.Context) error {
		s, err := b.js.Stream(ctx, wire.StreamDead)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return nil
		}
		if err == nil {
			n = int(s.CachedInfo().State.Msgs)
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("counting dead letters: %w", err)
	}
	return n, nil
}

// deadKey names a letter that is there.
type deadKey struct{ tenant, id string } // tenant as in subjects

// deadKeys lists letters, newest first. tenant and id are as in subjects.
func (b *Bus) deadKeys(ctx context.Context, tenant, id string) (keys []deadKey, err error) {
	err = b.retry(ctx, func(ctx context.Context) error {
		s, err := b.js.Stream(ctx, wire.StreamDead)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		info, err := s.Info(ctx, jetstream.WithSubjectFilter(wire.SubjectDead(tenant, id)))
		if err != nil {
			return err
		}
		keys = keys[:0]
		for subject := range info.State.Subjects {
			parts := strings.Split(subject, ".")
			keys = append(keys, deadKey{parts[2], parts[3]})
		}
		return nil
	})
	slices.SortFunc(keys, func(a, b deadKey) int { return cmp.Compare(b.id, a.id) })
	return keys, err
}

// Dead selects dead letters.
type Dead struct {
	Tenant *string   // nil: of all tenants
	Before time.Time // that are older; zero: of any age
}

// keys lists the letters, newest first.
func (d Dead) keys(ctx context.Context, b *Bus) ([]deadKey, error) {
	tenant := "*"
	if d.Tenant != nil {
		tenant = wire.DeadTenant(*d.Tenant)
	}
	keys, err := b.deadKeys(ctx, tenant, "*")
	if !d.Before.IsZero() {
		before := deadTime(d.Before)
		keys = slices.DeleteFunc(keys, func(k deadKey) bool { return k.id >= before })
	}
	return keys, err
}

// Letters returns the newest letters, at most as many, and how many there are.
func (b *Bus) Letters(ctx context.Context, d Dead, most int) (letters []wire.DeadLetter, all int, err error) {
	keys, err := d.keys(ctx, b)
	if err != nil {
		return nil, 0, fmt.Errorf("listing dead letters: %w", err)
	}
	for _, k := range keys[:min(most, len(keys))] {
		l, err := b.letter(ctx, k)
		if errors.Is(err, ErrNoLetter) { // it has gone since
			continue
		}
		if err != nil {
			return nil, 0, fmt.Errorf("listing dead letters: %w", err)
		}
		letters = append(letters, *l)
	}
	return letters, len(keys), nil
}

// Letter returns the letter with an id: ErrNoLetter when there is none.
func (b *Bus) Letter(ctx context.Context, id string) (*wire.DeadLetter, error) {
	err := ErrNoLetter
	if !strings.ContainsAny(id, ".*> \t\r\n") && id != "" {
		var keys []deadKey
		if keys, err = b.deadKeys(ctx, "*", id); err == nil && len(keys) == 0 {
			err = ErrNoLetter
		}
		if err == nil {
			var l *wire.DeadLetter
			if l, err = b.letter(ctx, keys[0]); err == nil {
				return l, nil
			}
		}
	}
	return nil, fmt.Errorf("reading dead letter %q: %w", id, err)
}

func (b *Bus) letter(ctx context.Context, k deadKey) (*wire.DeadLetter, error) {
	l := new(wire.DeadLetter)
	err := b.retry(ctx, func(ctx context.Context) error {
		s, err := b.js.Stream(ctx, wire.StreamDead)
		if err != nil {
			return err
		}
		m, err := s.GetLastMsgForSubject(ctx, wire.SubjectDead(k.tenant, k.id))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return ErrNoLetter
		}
		if err != nil {
			return err
		}
		if err := json.Unmarshal(m.Data, l); err != nil {
			return fmt.Errorf("%w: %w", wire.ErrMalformed, err)
		}
		return nil
	})
	return l, err
}

// Request reads the body of a letter's request and the pictures of l.Fetched: ErrNoRequest when they are not all there.
func (b *Bus) Request(ctx context.Context, l *wire.DeadLetter) (body []byte, pictures [][]byte, err error) {
	fail := func(err error) ([]byte, [][]byte, error) {
		return nil, nil, fmt.Errorf("reading the request of dead letter %s: %w", l.ID, err)
	}
	if l.Body == 0 {
		return fail(fmt.Errorf("%w: %s", ErrNoRequest, cmp.Or(l.Missing, "it was left out")))
	}
	store, err := b.js.ObjectStore(ctx, wire.BucketDead)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		err = ErrNoRequest
	}
	if err != nil {
		return fail(err)
	}
	get := func(name string) ([]byte, error) {
		r, err := store.Get(ctx, name)
		if errors.Is(err, jetstream.ErrObjectNotFound) {
			return nil, fmt.Errorf("%w: %s has been deleted or has expired", ErrNoRequest, name)
		}
		if err != nil {
			return nil, err
		}
		defer r.Close() // it was only read
		return io.ReadAll(r)
	}
	if body, err = get(wire.DeadBody(l)); err != nil {
		return fail(err)
	}
	for i := range l.Fetched {
		p, err := get(wire.DeadFetched(l, i))
		if err != nil {
			return fail(err)
		}
		pictures = append(pictures, p)
	}
	return body, pictures, nil
}

// PurgeLetter deletes a letter and its request: ErrNoLetter when it is not there.
func (b *Bus) PurgeLetter(ctx context.Context, id string) error {
	l, err := b.Letter(ctx, id)
	if err != nil {
		return err
	}
	return b.purge(ctx, l)
}

// PurgeLetters deletes letters and their requests, and returns how many.
func (b *Bus) PurgeLetters(ctx context.Context, d Dead) (n int, err error) {
	keys, err := d.keys(ctx, b)
	if err != nil {
		return 0, fmt.Errorf("listing dead letters: %w", err)
	}
	for _, k := range keys {
		l, err := b.letter(ctx, k)
		if errors.Is(err, ErrNoLetter) {
			continue
		}
		if err != nil {
			return n, fmt.Errorf("reading dead letter %s: %w", k.id, err)
		}
		if err := b.purge(ctx, l); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// purge deletes the objects first: while one is left, so is the letter that names it.
func (b *Bus) purge(ctx context.Context, l *wire.DeadLetter) error {
	err := b.retry(ctx, func(ctx context.Context) error {
		err := b.deleteRequest(ctx, l)
		if err != nil && !errors.Is(err, jetstream.ErrBucketNotFound) {
			return err
		}
		s, err := b.js.Stream(ctx, wire.StreamDead)
		if err != nil {
			return err
		}
		return s.Purge(ctx, jetstream.WithPurgeSubject(wire.SubjectDead(wire.DeadTenant(l.Tenant), l.ID)))
	})
	if err != nil {
		return fmt.Errorf("deleting dead letter %s: %w", l.ID, err)
	}
	return nil
}
