// Package bus is the way of messages between services: work queues on JetStream with explicit acks, join records and
// heartbeats in key-value buckets, and plain publish and request/reply for what may be lost. It knows no meaning of
// messages (shared/wire holds them), moves no pictures, MM objects or KV (shared/mem does), and its acks are no fence:
// whoever acts on a message checks its claim generation first.
//
// All streams, consumers and buckets are permanent; every Connect makes those that are missing.
package bus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/wire"
)

// Stages name the work queues; they are what Publish and Consumer take.
const (
	StageEncode  = "encode"
	StagePrefill = "prefill"
	StageDecode  = "decode"
)

// Defaults of the options.
const (
	DefaultAckWait     = 30 * time.Second
	DefaultInstanceTTL = 5 * time.Second
)

const (
	tryTimeout    = 500 * time.Millisecond // one try at a publish, ack or bucket operation
	setupTimeout  = 5 * time.Second        // one try at making a stream, consumer or bucket
	reconnectWait = 100 * time.Millisecond
	drainTimeout  = 3 * time.Second
	dedupeWindow  = 2 * time.Minute
	maxAckPending = 1 << 16
	maxMessages   = 1 << 20 // of one stream; publishers then see an error rather than a full disk
	joinTTL       = 24 * time.Hour
)

// Errors of Connect, Look, Publish and Consumer.
var (
	// ErrStage is returned for a stage that is none of the Stage constants.
	ErrStage = errors.New("no such stage")
	// ErrNoJetStream is returned by Connect when the NATS server runs without JetStream.
	ErrNoJetStream = errors.New("NATS server runs without JetStream (start it with -js)")
	// ErrNoStore is returned by PublishWithin and CreateJoinWithin when the server stores nothing.
	ErrNoStore = errors.New("NATS stores no messages")
	// ErrUnreachable is returned by Look when no server answers.
	ErrUnreachable = errors.New("no NATS server answers")
	// ErrClosed is returned by calls that wait while the Bus is closed.
	ErrClosed = errors.New("bus is closed")
)

// stage names a work queue. The descriptions are for operators who look with the tools of NATS.
type stage struct{ name, stream, consumer, holds, takers string }

var stages = []stage{
	{StageEncode, wire.StreamEncode, wire.ConsumerEncode, "a message for each picture to encode", "all encoders"},
	{StagePrefill, wire.StreamPrefill, wire.ConsumerPrefill, "a message for each prompt to compute", "all prefill instances"},
	{StageDecode, wire.StreamDecode, wire.ConsumerDecode, "a message for each choice to continue", "all decoders"},
}

func findStage(name string) (stage, error) {
	for _, s := range stages {
		if s.name == name {
			return s, nil
		}
	}
	return stage{}, fmt.Errorf("stage %q: %w", name, ErrStage)
}

// Option changes a Bus from its defaults. Options that are part of streams, consumers or buckets must be the same for
// all services on one NATS.
type Option func(*Bus)

// WithAckWait sets the time after which an unacked message that nobody keeps in progress is delivered again; default
// DefaultAckWait, for 0 too. All that connect to one server say the same: the last one's counts.
func WithAckWait(d time.Duration) Option {
	return func(b *Bus) { b.ackWait = cmp.Or(d, DefaultAckWait) }
}

// WithInstanceTTL sets how long a heartbeat lives without a successor; default DefaultInstanceTTL. Heartbeats go out
// every fifth of it.
func WithInstanceTTL(d time.Duration) Option { return func(b *Bus) { b.instanceTTL = d } }

// WithReplicas sets on how many servers of a cluster of NATS each message and record is. 0, the default: as many as there are
// when a stream is made, three of three servers or more, else one; what is there already stays as it is. All that connect to
// one NATS say the same.
func WithReplicas(n int) Option { return func(b *Bus) { b.replicas = n } }

// Bus is a connection to NATS. It is safe for concurrent use; its owner calls Close.
type Bus struct {
	log         *slog.Logger
	ackWait     time.Duration
	instanceTTL time.Duration
	replicas    int  // 0: automatic
	looks       bool // made by Look

	conn       *nats.Conn
	js         jetstream.JetStream
	joins      jetstream.KeyValue
	joinStream jetstream.Stream // the stream behind joins
	instances  jetstream.KeyValue
	layouts    jetstream.KeyValue
	keeper     *keeper

	ctx    context.Context // ends at Close; the life of the Bus's own goroutines
	cancel context.CancelFunc
	wg     sync.WaitGroup
	gone   chan struct{} // closed when conn is closed for good

	mu       sync.Mutex
	epoch    context.Context // ends, and is replaced, at each reconnect; child of ctx
	endEpoch context.CancelFunc
	ready    bool // Connect is done
	closed   bool
}

// Connect connects to the NATS server at url and makes the streams, consumers and buckets that are missing. It tries
// until ctx ends, then the error says what the last try failed with; a malformed url, refused credentials and an account
// without JetStream (ErrNoJetStream) are errors at once; a server without it may be one that starts. The connection is made again for ever when it breaks, and
// what is missing then is made again too. Name is what monitoring shows for the connection.
func Connect(ctx context.Context, url, name string, log *slog.Logger, opts ...Option) (*Bus, error) {
	return connect(ctx, url, name, log, false, opts)
}

// Look is Connect for commands, which look at a running system, or ask it for something, and end. It fails with ErrUnreachable when no
// server answers, with ErrNoJetStream when that has none, and where all buckets are there it makes and changes nothing: streams and consumers stay as the services have made
// them, also when the connection comes back. Close does not wait for subscriptions.
func Look(ctx context.Context, url, name string, log *slog.Logger, opts ...Option) (*Bus, error) {
	return connect(ctx, url, name, log, true, opts)
}

func connect(ctx context.Context, url, name string, log *slog.Logger, looks bool, opts []Option) (*Bus, error) {
	b := &Bus{
		looks:       looks,
		log:         log,
		ackWait:     DefaultAckWait,
		instanceTTL: DefaultInstanceTTL,
		gone:        make(chan struct{}),
	}
	for _, o := range opts {
		o(b)
	}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.epoch, b.endEpoch = context.WithCancel(b.ctx)
	b.keeper = newKeeper(b.ackWait/3, func(reply string) error { return b.conn.Publish(reply, ackProgress) })
	if err := b.dial(ctx, url, name); err != nil {
		b.cancel()
		return nil, ConnectError(url, err)
	}
	err := b.open(ctx)
	if err != nil {
		b.cancel()
		b.conn.Close()
		<-b.gone
		return nil, fmt.Errorf("preparing JetStream at %s: %w", Redacted(url), err)
	}
	b.wg.Go(func() { b.keeper.run(b.ctx) })
	b.mu.Lock()
	b.ready = true
	b.mu.Unlock()
	return b, nil
}

// open makes what JetStream lacks and opens the buckets.
func (b *Bus) open(ctx context.Context) (err error) {
	if b.js, err = jetstream.New(b.conn, jetstream.WithDefaultTimeout(setupTimeout)); err != nil {
		return err
	}
	if b.looks {
		if err := b.persist(ctx, b.openBuckets); !missing(err) {
			return err
		}
	}
	if err := b.setup(ctx); err != nil {
		return err
	}
	return b.openBuckets(ctx)
}

// openBuckets opens the buckets, which are there.
func (b *Bus) openBuckets(ctx context.Context) (err error) {
	if b.joins, err = b.js.KeyValue(ctx, wire.BucketJoin); err != nil {
		return fmt.Errorf("bucket %s: %w", wire.BucketJoin, err)
	}
	if b.joinStream, err = b.js.Stream(ctx, "KV_"+wire.BucketJoin); err != nil {
		return fmt.Errorf("bucket %s: %w", wire.BucketJoin, err)
	}
	if b.instances, err = b.js.KeyValue(ctx, wire.BucketInstances); err != nil {
		return fmt.Errorf("bucket %s: %w", wire.BucketInstances, err)
	}
	if b.layouts, err = b.js.KeyValue(ctx, wire.BucketLayouts); err != nil {
		return fmt.Errorf("bucket %s: %w", wire.BucketLayouts, err)
	}
	return nil
}

// Lasting are the options of connections to NATS that outlive whatever happens to it, of this package and of others. name is
// what monitoring shows. A connection that breaks is made again for ever, some ten times a second; a network that swallows
// everything is noticed after 15 to 20 s (nats.go breaks the connection when the fourth ping finds three unanswered). What is
// sent meanwhile waits in the client, 8 MiB of it (nats.DefaultReconnectBufSize), and is sent, late, when the connection is
// back: no receiver may rely on a message being young.
func Lasting(name string) []nats.Option {
	return []nats.Option{
		nats.Name(name),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(reconnectWait),
		nats.ReconnectJitter(reconnectWait/2, reconnectWait/2),
		nats.Timeout(2 * time.Second),
		nats.PingInterval(5 * time.Second),
		nats.MaxPingsOutstanding(3),
	}
}

// Stay makes a Lasting connection: now or, when no server answers, whenever one does. Anything else, as refused credentials, is an error.
func Stay(url, name string, opts ...nats.Option) (*nats.Conn, error) {
	opts = append(Lasting(name), opts...)
	conn, err := nats.Connect(url, opts...)
	if err != nil && unreachable(err) {
		conn, err = nats.Connect(url, append(opts, nats.RetryOnFailedConnect(true))...)
	}
	if err != nil {
		return nil, ConnectError(url, err)
	}
	return conn, nil
}

// dial connects, trying again while the server cannot be reached.
func (b *Bus) dial(ctx context.Context, url, name string) error {
	opts := append(Lasting(name),
		nats.DrainTimeout(drainTimeout),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) {
			if sub != nil {
				b.log.Warn("NATS reports an error", "subject", sub.Subject, "error", err)
				return
			}
			b.log.Warn("NATS reports an error", "error", err)
		}),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if b.ctx.Err() == nil {
				b.log.Warn("connection to NATS broke; connecting again", "error", err)
			}
		}),
		nats.ReconnectHandler(b.reconnected),
		nats.ClosedHandler(func(*nats.Conn) { close(b.gone) }))
	for wait := newPause(); ; {
		var err error
		if b.conn, err = nats.Connect(url, opts...); err == nil {
			return nil
		}
		switch {
		case !unreachable(err):
			return err
		case b.looks:
			return fmt.Errorf("%w: %w", ErrUnreachable, err)
		}
		if wait.tries == 0 {
			b.log.Info("NATS cannot be reached yet; trying again", "url", Redacted(url), "error", err)
		}
		if wait.sleep(ctx) != nil {
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// unreachable reports whether a connect failed because no server answers, which may change.
func unreachable(err error) bool {
	if malformed := (*url.Error)(nil); errors.As(err, &malformed) { // it is a net.Error too
		return false
	}
	var n net.Error
	return errors.As(err, &n) || errors.Is(err, nats.ErrNoServers) || errors.Is(err, nats.ErrTimeout) ||
		strings.HasSuffix(err.Error(), "EOF")
}

// setup makes what is missing.
func (b *Bus) setup(ctx context.Context) error { return b.persist(ctx, b.ensure) }

// missing says of an error that a bucket, or its stream, is not there.
func missing(err error) bool {
	return errors.Is(err, jetstream.ErrBucketNotFound) || errors.Is(err, jetstream.ErrStreamNotFound)
}

// persist calls f, again on errors that may pass.
func (b *Bus) persist(ctx context.Context, f func(context.Context) error) error {
	for wait := newPause(); ; {
		err := f(ctx)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount):
			return ErrNoJetStream
		case permanent(err), missing(err):
			return err
		case errors.Is(err, nats.ErrNoResponders) && b.looks:
			return fmt.Errorf("%w: %w", ErrNoJetStream, err)
		case errors.Is(err, nats.ErrNoResponders) && wait.tries == 0:
			b.log.Warn("NATS has no JetStream yet; trying again (nats-server needs -js)")
		}
		if wait.sleep(ctx) != nil {
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// ensure makes the streams, consumers and buckets, or brings their settings up to date.
func (b *Bus) ensure(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	for _, s := range stages {
		copies, err := b.copies(ctx, s.stream)
		if err != nil {
			return err
		}
		stream, err := b.ensureStream(ctx, jetstream.StreamConfig{
			Name:        s.stream,
			Description: s.holds,
			Subjects:    []string{wire.StageSubjects(s.name)},
			Retention:   jetstream.WorkQueuePolicy,
			Storage:     jetstream.FileStorage,
			Discard:     jetstream.DiscardNew,
			Duplicates:  dedupeWindow,
			MaxMsgSize:  wire.MaxMessage,
			MaxMsgs:     maxMessages,
			Replicas:    copies,
		})
		if err != nil {
			return fmt.Errorf("stream %s: %w", s.stream, err)
		}
		consumer := jetstream.ConsumerConfig{
			Durable:       s.consumer,
			Description:   s.takers,
			AckPolicy:     jetstream.AckExplicitPolicy,
			AckWait:       b.ackWait,
			MaxDeliver:    -1,
			MaxAckPending: maxAckPending,
			MaxWaiting:    1 << 12,

			PriorityPolicy: jetstream.PriorityPolicyPrioritized,
			PriorityGroups: []string{pullGroup},
		}
		if _, err = stream.CreateConsumer(ctx, consumer); errors.Is(err, jetstream.ErrConsumerExists) { // with other settings
			_, err = stream.UpdateConsumer(ctx, consumer)
		}
		if err != nil {
			return fmt.Errorf("consumer %s of stream %s: %w", s.consumer, s.stream, err)
		}
	}
	if err := b.ensureEvents(ctx); err != nil {
		return err
	}
	for _, bucket := range []jetstream.StreamConfig{
		{Name: wire.BucketJoin, Description: "which pictures of a request are encoded", MaxAge: joinTTL, Storage: jetstream.FileStorage},
		{Name: wire.BucketInstances, Description: "heartbeats of all instances", MaxAge: b.instanceTTL, Storage: jetstream.MemoryStorage},
		{Name: wire.BucketLayouts, Description: "NPUs and placement of experts of instances that were changed", Storage: jetstream.FileStorage},
		{Name: wire.BucketScaler, Description: "which scaler leads, and what it has under way", Storage: jetstream.FileStorage},
	} {
		if err := b.ensureBucket(ctx, bucket); err != nil {
			return fmt.Errorf("bucket %s: %w", bucket.Name, err)
		}
	}
	return nil
}

// ensureBucket makes a key-value bucket of the stream behind it, with the settings that nats.go gives one (NATS ADR-8) but
// direct gets: in a cluster any server answers those, also one that has not heard yet of what was just written, and a
// join record would not be there for the first encoder that looks for it.
func (b *Bus) ensureBucket(ctx context.Context, bucket jetstream.StreamConfig) (err error) {
	name := bucket.Name
	bucket.Name, bucket.Subjects = "KV_"+name, []string{"$KV." + name + ".>"}
	bucket.MaxMsgsPerSubject, bucket.MaxMsgSize, bucket.Discard = 1, wire.MaxMessage, jetstream.DiscardNew
	bucket.AllowRollup, bucket.DenyDelete = true, true
	bucket.Duplicates = dedupeWindow
	if bucket.MaxAge > 0 {
		bucket.Duplicates = min(dedupeWindow, bucket.MaxAge)
	}
	if bucket.Replicas, err = b.copies(ctx, bucket.Name); err != nil {
		return err
	}
	_, err = b.ensureStream(ctx, bucket)
	return err
}

// ensureStream makes a stream, or changes its settings if they are others. One that is as it should be is left alone: an update
// that changes nothing is work for the server all the same, and not harmless (RATIONALE.md).
func (b *Bus) ensureStream(ctx context.Context, cfg jetstream.StreamConfig) (jetstream.Stream, error) {
	stream, err := b.js.CreateStream(ctx, cfg)
	if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
		stream, err = b.js.UpdateStream(ctx, cfg)
	}
	return stream, err
}

// copies is how many servers a stream is to be on. A stream that is there keeps its number unless the user has said one: a
// service that sees only a part of the cluster must not take copies away.
func (b *Bus) copies(ctx context.Context, stream string) (int, error) {
	if b.replicas > 0 {
		return b.replicas, nil
	}
	info, err := b.js.Stream(ctx, stream)
	switch {
	case err == nil:
		return info.CachedInfo().Config.Replicas, nil
	case !errors.Is(err, jetstream.ErrStreamNotFound):
		return 0, fmt.Errorf("reading stream %s: %w", stream, err)
	case b.conn.ConnectedClusterName() != "" && len(b.conn.Servers()) >= mostCopies:
		return mostCopies, nil
	}
	return 1, nil
}

// mostCopies is the automatic number of replicas in a cluster: with three, one may fail.
const mostCopies = 3

// reconnected makes again what a server with a lost store no longer has, unless the Bus only looks, and wakes whoever must ask again.
func (b *Bus) reconnected(conn *nats.Conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || !b.ready { // setup tries again by itself before Connect is done
		return
	}
	b.log.Info("connected to NATS again", "url", Redacted(conn.ConnectedUrl()))
	prepare := b.setup
	if b.looks {
		prepare = func(context.Context) error { return nil }
	} else {
		b.Emit(wire.Event{Kind: wire.EventReached, Instance: conn.Opts.Name, Text: "connected to NATS again"})
	}
	b.wg.Go(func() {
		if err := prepare(b.ctx); err != nil {
			if b.ctx.Err() == nil {
				b.log.Error("preparing JetStream after a reconnect failed", "error", err)
			}
			return
		}
		b.keeper.kick()
		b.mu.Lock()
		defer b.mu.Unlock()
		b.endEpoch()
		b.epoch, b.endEpoch = context.WithCancel(b.ctx)
	})
}

// connection returns a context that ends once the present connection has been replaced by a new one, or at Close.
func (b *Bus) connection() context.Context {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.epoch
}

// Reconnected returns a channel that is closed once the present connection has been replaced by a new one and what a server
// must have is there again, or at Close.
func (b *Bus) Reconnected() <-chan struct{} { return b.connection().Done() }

// within returns a context that ends with ctx, after d, when the connection has been replaced, and at Close. Stop frees
// what it holds.
func (b *Bus) within(ctx context.Context, d time.Duration) (_ context.Context, stop func()) {
	ctx, cancel := context.WithTimeout(ctx, d)
	unhook := context.AfterFunc(b.connection(), cancel)
	return ctx, func() { unhook(); cancel() }
}

// background runs f, which ends soon after b.ctx, on a goroutine that Close waits for. It returns false, and does not, when the Bus is closed.
func (b *Bus) background(f func()) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return false
	}
	b.wg.Go(f)
	return true
}

// Conn is the NATS connection, for subjects outside the work queues. Its owner is the Bus.
func (b *Bus) Conn() *nats.Conn { return b.conn }

// JetStream is the JetStream context of the connection.
func (b *Bus) JetStream() jetstream.JetStream { return b.js }

// Close ends waiting calls, takes back the heartbeats that are announced, drains the connection (subscriptions end,
// messages that Next has not handed out are naked, what is buffered is sent) and returns when it is closed. Deliveries
// that were handed out are no longer kept in progress. Idempotent.
func (b *Bus) Close() {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		<-b.gone
		return
	}
	b.closed = true
	b.mu.Unlock()
	b.cancel()
	b.wg.Wait()
	if b.looks { // a drain looks every 10 ms whether subscriptions have ended
		if b.conn.IsConnected() {
			_ = b.conn.FlushTimeout(drainTimeout) // what cannot be sent by then is lost
		}
		b.conn.Close()
	} else if err := b.conn.Drain(); err != nil {
		b.conn.Close()
	}
	<-b.gone
}
