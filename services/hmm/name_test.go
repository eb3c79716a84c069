package hmm_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/hmm"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
)

// serveNamesake runs another daemon of the node n1, one that says it has been there for so much longer, whose end the test looks at.
func serveNamesake(t *testing.T, nc *nats.Conn, age time.Duration) (socket string, ended chan error) {
	t.Helper()
	dir, err := os.MkdirTemp("", "hmm")
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket = filepath.Join(dir, "s")
	d, err := hmm.New(hmm.Config{Socket: socket, Node: "n1", NPUs: 1, NPUBytes: 64 * page, HostBytes: 64 * page, NATS: nc, NameEvery: 20 * time.Millisecond}, quiet())
	must(t, err)
	d.Age(age)
	ctx, cancel := context.WithCancel(context.Background())
	ended = make(chan error, 1)
	stopped := make(chan struct{})
	go func() { ended <- d.Serve(ctx); close(stopped) }()
	t.Cleanup(func() { cancel(); <-stopped })
	return socket, ended
}

// Of two daemons of one name, neither of which has seen the other start, exactly one ends, and the other one's clients notice nothing.
func TestNamesake(t *testing.T) {
	for _, age := range []time.Duration{0, time.Hour} { // of the first: with none who ends is chance
		one, other := natsServer(t)
		socket, first := serveNamesake(t, one, age)
		c := dial(t, socket, hbm.Hello{Instance: "d1", Role: "decode"})
		o := alloc(t, c, hbm.Spec{Kind: mem.KindKV, NPU: 0, Bytes: 100, Ref: ref("r", 1)})
		socket2, second := serveNamesake(t, other, 0)
		var err error
		select {
		case err = <-second:
			free(t, c, o...)
			must(t, c.Close())
		case err = <-first:
			if age > 0 {
				t.Fatalf("the one that was there for longer ended: %v", err)
			}
			must(t, dial(t, socket2, hbm.Hello{Instance: "d2", Role: "decode"}).Close())
		case <-time.After(time.Minute):
			t.Fatal("two daemons have one name")
		}
		if !errors.Is(err, hmm.ErrName) {
			t.Errorf("Serve: %v, want ErrName", err)
		}
		select {
		case err := <-first:
			t.Errorf("the other one ended, too: %v", err)
		case err := <-second:
			t.Errorf("the other one ended, too: %v", err)
		case <-time.After(100 * time.Millisecond): // some looks
		}
	}
}
