package bus_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

// letter is a dead letter of a tenant that failed at a time.
func letter(tenant string, at time.Time) *wire.DeadLetter {
	return &wire.DeadLetter{ID: bus.NewDeadID(at), Time: at.UTC().Truncate(time.Millisecond), Tenant: tenant, Reason: wire.DeadAttempts, Error: "x"}
}

func noise(n int) []byte {
	r := rand.NewChaCha8([32]byte{byte(n)})
	b := make([]byte, n)
	_, _ = r.Read(b)
	return b
}

func ids(letters []wire.DeadLetter) (out []string) {
	for _, l := range letters {
		out = append(out, l.ID)
	}
	return out
}

// What is buried is found again, newest first, whole, by tenant and by age, until it is purged.
func TestDeadLetters(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	ctx := t.Context()
	if n, err := b.DeadCount(ctx); n != 0 || err != nil {
		t.Fatalf("%d letters before the first, %v", n, err)
	}
	if all, n, err := b.Letters(ctx, bus.Dead{}, 10); len(all) != 0 || n != 0 || err != nil {
		t.Fatalf("letters before the first: %v, %d, %v", all, n, err)
	}
	if _, err := b.Letter(ctx, "abc"); !errors.Is(err, bus.ErrNoLetter) {
		t.Fatalf("a letter before the first: %v", err)
	}
	if n, err := b.PurgeLetters(ctx, bus.Dead{}); n != 0 || err != nil {
		t.Fatalf("purged %d before the first, %v", n, err)
	}
	began := time.Now()
	body, pictures := noise(3<<20), [][]byte{noise(100_000), {}, noise(32 << 10)}
	tenants := []string{"", "a.b *>", "", strings.Repeat("ü", 64)}
	var letters []*wire.DeadLetter
	for i, tenant := range tenants {
		l := letter(tenant, began.Add(time.Duration(i)*time.Minute))
		for range pictures {
			l.Fetched = append(l.Fetched, wire.DeadPicture{URL: "https://example.com/x.png", Bytes: 1})
		}
		if err := b.Bury(ctx, l, body, pictures); err != nil {
			t.Fatal(err)
		}
		letters = append(letters, l)
	}
	facts := letter("", began.Add(time.Hour))
	facts.Missing = "it is switched off"
	if err := b.Bury(ctx, facts, nil, nil); err != nil {
		t.Fatal(err)
	}
	got, n, err := b.Letters(ctx, bus.Dead{}, 2)
	if err != nil || n != 5 || !cmp.Equal(ids(got), []string{facts.ID, letters[3].ID}) {
		t.Errorf("the newest two are %v of %d, %v", ids(got), n, err)
	}
	tenant := "a.b *>"
	got, n, err = b.Letters(ctx, bus.Dead{Tenant: &tenant}, 10)
	if err != nil || n != 1 || len(got) != 1 {
		t.Fatalf("the tenant's are %v of %d, %v", ids(got), n, err)
	}
	if diff := cmp.Diff(letters[1], &got[0]); diff != "" {
		t.Error(diff)
	}
	l, err := b.Letter(ctx, letters[3].ID)
	if err != nil {
		t.Fatal(err)
	}
	gotBody, gotPictures, err := b.Request(ctx, l)
	if err != nil || !bytes.Equal(gotBody, body) || len(gotPictures) != len(pictures) {
		t.Fatalf("%d bytes and %d pictures, %v", len(gotBody), len(gotPictures), err)
	}
	for i, p := range pictures {
		if !bytes.Equal(gotPictures[i], p) {
			t.Errorf("picture %d differs", i)
		}
	}
	if _, _, err := b.Request(ctx, facts); !errors.Is(err, bus.ErrNoRequest) || !strings.Contains(err.Error(), facts.Missing) {
		t.Errorf("the request of a letter without one: %v", err)
	}
	objects := func() int {
		t.Helper()
		store, err := b.JetStream().ObjectStore(ctx, wire.BucketDead)
		if err != nil {
			t.Fatal(err)
		}
		all, err := store.List(ctx)
		if err != nil && !errors.Is(err, jetstream.ErrNoObjectsFound) {
			t.Fatal(err)
		}
		return len(all)
	}
	if n := objects(); n != 4*4 {
		t.Errorf("%d objects, want those of four requests", n)
	}

	if err := b.PurgeLetter(ctx, letters[3].ID); err != nil {
		t.Fatal(err)
	}
	if err := b.PurgeLetter(ctx, letters[3].ID); !errors.Is(err, bus.ErrNoLetter) {
		t.Errorf("purging a letter again: %v", err)
	}
	if _, _, err := b.Request(ctx, letters[3]); !errors.Is(err, bus.ErrNoRequest) {
		t.Errorf("the request of a purged letter: %v", err)
	}
	none := ""
	if n, err := b.PurgeLetters(ctx, bus.Dead{Tenant: &none, Before: began.Add(time.Second)}); n != 1 || err != nil {
		t.Errorf("purged %d old ones without a tenant, %v", n, err)
	}
	got, _, err = b.Letters(ctx, bus.Dead{}, 10)
	if err != nil || !cmp.Equal(ids(got), []string{facts.ID, letters[2].ID, letters[1].ID}) {
		t.Errorf("left are %v, %v", ids(got), err)
	}
	if n, err := b.PurgeLetters(ctx, bus.Dead{}); n != 3 || err != nil {
		t.Errorf("purged %d, %v", n, err)
	}
	if n, err := b.DeadCount(ctx); n != 0 || err != nil || objects() != 0 {
		t.Errorf("%d letters and %d objects are left, %v", n, objects(), err)
	}
	for _, bad := range []string{"", "*", ">", "a b", "x.y"} {
		if _, err := b.Letter(ctx, bad); !errors.Is(err, bus.ErrNoLetter) {
			t.Errorf("letter %q: %v", bad, err)
		}
	}
}

// When requests do not fit the store, letters are kept without; what is stored of one that does not fit goes again.
func TestDeadStoreFull(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	ctx := t.Context()
	if _, err := b.JetStream().CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: wire.BucketDead, MaxBytes: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	whole, small := letter("t", time.Now()), noise(600<<10)
	if err := b.Bury(ctx, whole, small, nil); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		l := letter("t", time.Now())
		l.Fetched = make([]wire.DeadPicture, 1)
		if err := b.Bury(ctx, l, noise(100), [][]byte{noise(600<<10 + i)}); !errors.Is(err, bus.ErrFull) {
			t.Fatalf("buried %d bytes beside %d in a store of a MiB: %v", 600<<10, len(small), err)
		}
		got, err := b.Letter(ctx, l.ID)
		if err != nil || got.Body != 0 || got.Missing == "" || len(got.Fetched) != 0 {
			t.Errorf("the letter is %+v, %v", got, err)
		}
	}
	if body, _, err := b.Request(ctx, whole); err != nil || !bytes.Equal(body, small) {
		t.Errorf("what was stored before is gone: %v", err)
	}
	if err := b.Bury(ctx, letter("t", time.Now()), noise(300<<10), nil); err != nil {
		t.Errorf("no room where there was room: %v", err)
	}
}

// A server with little room gets a small store.
func TestDeadStoreOfASmallDisk(t *testing.T) {
	disk := bustest.NewDisk(t, "64m")
	b := connect(t, bustest.RunAt(t, disk.Dir).URL())
	l, body := letter("", time.Now()), noise(1<<20)
	if err := b.Bury(t.Context(), l, body, nil); err != nil {
		t.Fatal(err)
	}
	if got, _, err := b.Request(t.Context(), l); err != nil || !bytes.Equal(got, body) {
		t.Error(err)
	}
}

// Objects that are missing are an error that says so, and the letter can still be purged.
func TestDeadObjectMissing(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	ctx := t.Context()
	l := letter("t", time.Now())
	l.Fetched = make([]wire.DeadPicture, 1)
	if err := b.Bury(ctx, l, noise(10), [][]byte{noise(20)}); err != nil {
		t.Fatal(err)
	}
	store, err := b.JetStream().ObjectStore(ctx, wire.BucketDead)
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Delete(ctx, wire.DeadFetched(l, 0)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.Request(ctx, l); !errors.Is(err, bus.ErrNoRequest) {
		t.Errorf("a request without a picture: %v", err)
	}
	if err := b.JetStream().DeleteObjectStore(ctx, wire.BucketDead); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.Request(ctx, l); !errors.Is(err, bus.ErrNoRequest) {
		t.Errorf("a request without a bucket: %v", err)
	}
	if err := b.PurgeLetter(ctx, l.ID); err != nil {
		t.Error(err)
	}
}

// Without NATS nothing is buried, in the time that there is; with it, everything again, also when its store was lost.
func TestDeadWithoutNATS(t *testing.T) {
	t.Parallel()
	server := bustest.Run(t)
	b := connect(t, server.URL())
	if err := b.Bury(t.Context(), letter("", time.Now()), noise(10), nil); err != nil {
		t.Fatal(err)
	}
	server.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := b.Bury(ctx, letter("", time.Now()), noise(10), nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("buried without NATS: %v", err)
	}
	if _, err := b.DeadCount(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("counted without NATS: %v", err)
	}
	server.Wipe()
	server.Start()
	if err := b.Bury(t.Context(), letter("", time.Now()), noise(10), nil); err != nil {
		t.Error(err)
	}
	if n, err := b.DeadCount(t.Context()); n != 1 || err != nil {
		t.Errorf("%d letters after the store was lost, %v", n, err)
	}
}

// Gateways that all have their first letter at the same time make the store together.
func TestBuryTogether(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	var wg sync.WaitGroup
	for i := range 4 {
		b := connect(t, url)
		for k := range 5 {
			wg.Go(func() {
				if err := b.Bury(t.Context(), letter(fmt.Sprint(k), time.Now()), noise(100+i), nil); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	if n, err := connect(t, url).DeadCount(t.Context()); n != 20 || err != nil {
		t.Errorf("%d letters, %v", n, err)
	}
}

func TestDeadIDsSortByTime(t *testing.T) {
	at := time.Now()
	last := ""
	for i := range 1000 {
		id := bus.NewDeadID(at.Add(time.Duration(i) * time.Millisecond))
		if id <= last || len(id) != 13 {
			t.Fatalf("%q after %q", id, last)
		}
		last = id
	}
}
