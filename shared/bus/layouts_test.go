package bus_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/url"
	"reflect"
	"sync"
	"testing"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

// line is a TCP connection to a server that a test can stop in either direction.
type line struct {
	listener net.Listener
	server   string

	mu       sync.Mutex
	moved    *sync.Cond
	up, down bool // bytes are held
	waits    bool // what a client has published is
	conns    []net.Conn
}

func newLine(t *testing.T, server string) *line {
	t.Helper()
	u, err := url.Parse(server)
	if err != nil {
		t.Fatal(err)
	}
	l := &line{server: u.Host}
	l.moved = sync.NewCond(&l.mu)
	if l.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			from, err := l.listener.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("tcp", l.server)
			if err != nil {
				from.Close()
				continue
			}
			l.mu.Lock()
			l.conns = append(l.conns, from, to)
			l.mu.Unlock()
			wg.Go(func() { l.pass(to, from, &l.up) })
			wg.Go(func() { l.pass(from, to, &l.down) })
		}
	})
	t.Cleanup(func() { l.listener.Close(); l.hold(false, false); l.cut(); wg.Wait() })
	return l
}

func (l *line) url() string { return "nats://" + l.listener.Addr().String() }

// pass moves bytes from one side to the other, once they are not held.
func (l *line) pass(to, from net.Conn, held *bool) {
	defer to.Close()
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		l.mu.Lock()
		l.waits = l.waits || *held && bytes.Contains(buffer[:n], []byte("PUB "))
		for *held {
			l.moved.Wait()
		}
		l.mu.Unlock()
		if n > 0 {
			if _, werr := to.Write(buffer[:n]); werr != nil {
				return
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				from.Close()
			}
			return
		}
	}
}

// hold says which bytes stay where they are: those to the server, and those from it.
func (l *line) hold(up, down bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.up, l.down, l.waits = up, down, false
	l.moved.Broadcast()
}

// untilWaits waits until something that a client has published is held.
func (l *line) untilWaits(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(long); ; time.Sleep(time.Millisecond) {
		l.mu.Lock()
		waits := l.waits
		l.mu.Unlock()
		if waits {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("nothing is held")
		}
	}
}

// cut ends all connections. What is held of what their client has sent still gets to the server when it is held no more.
func (l *line) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, c := range l.conns {
		if i%2 == 0 || !l.up {
			c.Close()
		}
	}
	l.conns = nil
}

const layoutKey = "n.decoder-0"

func layout(epoch uint64) *wire.Layout {
	return &wire.Layout{Instance: "d", Asked: 2, Epoch: epoch, NPUs: []int{3, -1, 5}, Experts: []byte{0x80, 0x02, 0x80}}
}

// underWay is a record under which an operation is under way, committed the one in which it has come to its commit, given the
// one in which it was given up.
func underWay(op string) *wire.Layout {
	l := layout(1)
	l.Pending = &wire.Pending{ID: op, Kind: wire.ChangeScale, NPUs: 3, Left: time.Minute}
	return l
}

func committed(op string) *wire.Layout {
	l := layout(2)
	l.Last = &wire.Ended{ID: op, Kind: wire.ChangeScale, Committed: true}
	return l
}

func given(op string) *wire.Layout {
	l := layout(1)
	l.Last = &wire.Ended{ID: op, Kind: wire.ChangeScale, Why: "late"}
	return l
}

func expectLayout(t *testing.T, b *bus.Bus, want *wire.Layout) uint64 {
	t.Helper()
	got, revision, err := b.Layout(t.Context(), layoutKey)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("the record is %+v, %v; want %+v", got, err, want)
	}
	return revision
}

func swap(t *testing.T, b *bus.Bus, l *wire.Layout, revision uint64) uint64 {
	t.Helper()
	revision, err := b.SwapLayout(t.Context(), layoutKey, l, revision)
	if err != nil {
		t.Fatal(err)
	}
	return revision
}

func TestLayoutRecord(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	if _, _, err := b.Layout(t.Context(), layoutKey); !errors.Is(err, bus.ErrNoLayout) {
		t.Errorf("a record that never was: %v", err)
	}
	first := swap(t, b, layout(1), 0)
	for _, revision := range []uint64{0, first + 1} {
		if _, err := b.SwapLayout(t.Context(), layoutKey, layout(2), revision); !errors.Is(err, bus.ErrLayoutChanged) {
			t.Errorf("over revision %d: %v", revision, err)
		}
	}
	if at := expectLayout(t, b, layout(1)); at != first {
		t.Errorf("revision %d, want %d", at, first)
	}
	swap(t, b, layout(2), first)
	expectLayout(t, b, layout(2))
	for range 2 { // deleting twice is no error
		if err := b.DeleteLayout(t.Context(), layoutKey); err != nil {
			t.Error(err)
		}
	}
	swap(t, b, layout(3), 0) // as if there never had been one
}

// Of many who replace one revision one succeeds.
func TestSwapLayoutConcurrently(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	buses := []*bus.Bus{connect(t, url), connect(t, url), connect(t, url)}
	var revision uint64
	for round := range uint64(5) {
		var mu sync.Mutex
		var wg sync.WaitGroup
		won := 0
		var next uint64
		for i, b := range buses {
			wg.Go(func() {
				l := layout(round)
				l.Instance = string(rune('a' + i))
				at, err := b.SwapLayout(t.Context(), layoutKey, l, revision)
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					won, next = won+1, at
				case !errors.Is(err, bus.ErrLayoutChanged):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won != 1 {
			t.Fatalf("%d of three have replaced revision %d", won, revision)
		}
		revision = next
	}
}

// The record is stored and the answer is lost: who has stored it learns that it did, and from the record itself.
func TestSwapLayoutAnswerLost(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	direct, wire := connect(t, url), newLine(t, url)
	b := connect(t, wire.url())
	revision := swap(t, b, underWay("op"), 0)
	wire.hold(false, true)
	done := make(chan error, 1)
	go func() {
		_, err := b.SwapLayout(t.Context(), layoutKey, committed("op"), revision)
		done <- err
	}()
	untilLayout(t, direct, "op")
	wire.cut()
	wire.hold(false, false)
	if err := <-done; err != nil {
		t.Errorf("a swap whose answer was lost: %v", err)
	}
	expectLayout(t, direct, committed("op"))
}

// untilLayout waits until the record is the committed one of an operation.
func untilLayout(t *testing.T, b *bus.Bus, op string) {
	t.Helper()
	for deadline := time.Now().Add(long); ; time.Sleep(5 * time.Millisecond) {
		l, _, err := b.Layout(t.Context(), layoutKey)
		if err == nil && l.Is(op) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the record is %+v, %v", l, err)
		}
	}
}

// A swap without an answer is unclear, and settled either way: it has happened, then that is found out; or it has not, and then
// it does not happen later, when what was sent gets to the server after all.
func TestUnclearLayout(t *testing.T) {
	t.Parallel()
	url := bustest.Run(t).URL()
	for name, x := range map[string]struct {
		up, down bool
		want     *wire.Layout
	}{
		"happened":     {false, true, committed("op")},
		"has not yet":  {true, false, given("op")},
		"not possible": {true, true, given("op")},
	} {
		direct, line := connect(t, url), newLine(t, url)
		b := connect(t, line.url())
		if err := direct.DeleteLayout(t.Context(), layoutKey); err != nil {
			t.Fatal(err)
		}
		revision := swap(t, b, underWay("op"), 0)
		line.hold(x.up, x.down)
		ctx, cancel := context.WithCancel(t.Context())
		swapped := make(chan error, 1)
		go func() {
			_, err := b.SwapLayout(ctx, layoutKey, committed("op"), revision)
			swapped <- err
		}()
		if x.up {
			line.untilWaits(t)
		} else {
			untilLayout(t, direct, "op")
		}
		cancel()
		if err := <-swapped; !errors.Is(err, bus.ErrUnclear) {
			t.Fatalf("%s: %v", name, err)
		}
		got, _, err := direct.SettleLayout(t.Context(), layoutKey, given("op"), "op", revision)
		if err != nil || !reflect.DeepEqual(got, x.want) {
			t.Errorf("%s: settled as %+v, %v", name, got, err)
		}
		line.cut()
		line.hold(false, false) // what was held arrives
		if _, _, err := b.Layout(t.Context(), layoutKey); err != nil {
			t.Error(err)
		}
		expectLayout(t, direct, x.want)
	}
}

// An operation that is pending is cleared by whoever settles it, over whichever revision; somebody else's record is left alone, and
// one that the server has lost is made anew.
func TestSettleLayout(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	settle := func(revision uint64, want *wire.Layout) {
		t.Helper()
		got, at, err := b.SettleLayout(t.Context(), layoutKey, given("op"), "op", revision)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("settled as %+v, %v; want %+v", got, err, want)
		}
		if expectLayout(t, b, want) != at {
			t.Error("the revision is another one")
		}
	}
	first := swap(t, b, layout(1), 0)
	swap(t, b, underWay("op"), first) // the answer of which was lost
	settle(first, given("op"))
	at := swap(t, b, underWay("other"), expectLayout(t, b, given("op")))
	settle(first, underWay("other"))
	swap(t, b, committed("op"), at)
	settle(at, committed("op"))
	if err := b.DeleteLayout(t.Context(), layoutKey); err != nil {
		t.Fatal(err)
	}
	settle(at, given("op"))
}
