package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/openai/openai-go/v3"

	"trireme.dev/services/decoder"
	"trireme.dev/services/encoder"
	"trireme.dev/services/gateway"
	"trireme.dev/services/hmm"
	"trireme.dev/services/prefill"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/stage"
)

// inProcess runs every service as goroutines of the test, so that the race detector sees all of them: the stages as instances
// of one role each, or two of all roles.
func inProcess(tb testing.TB, combined bool) *cluster {
	tb.Helper()
	dir, err := os.MkdirTemp("", "tri") // short: a socket's path has 107 bytes
	if err != nil {
		tb.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(testWriter{tb}, &slog.HandlerOptions{Level: slog.LevelWarn}))
	server := bustest.Run(tb)
	conn, err := nats.Connect(server.URL())
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	tb.Cleanup(func() {
		cancel()
		wg.Wait()
		conn.Close()
		os.RemoveAll(dir)
	})
	run := func(name string, f func() error) {
		wg.Go(func() {
			if err := f(); err != nil && ctx.Err() == nil {
				tb.Errorf("%s ended: %v", name, err)
			}
		})
	}
	c := &cluster{data: dir, nats: server.URL()}
	socket := filepath.Join(dir, "hmm.sock")
	model := root + "/models/shapes-vl-moe"
	port := freePort(tb)
	c.url = fmt.Sprintf("http://127.0.0.1:%d", port)
	run("hmm", func() error {
		return hmm.Run(ctx, hmm.Config{Socket: socket, Node: "test", NPUs: 4, NPUBytes: 1 << 30, HostBytes: 256 << 20, NATS: conn}, log)
	})
	cfg := stage.Config{NATSURL: server.URL(), HMM: socket, Model: model}
	two := cfg
	two.NPUs = 2
	if combined {
		for range 2 {
			run("stage", func() error {
				s, err := stage.Open(ctx, "encode+prefill+decode", two, log)
				if err != nil {
					return err
				}
				defer s.Close()
				return s.Serve(ctx, encoder.Role(), prefill.Role(prefill.Config{}), decoder.Role(decoder.Config{}))
			})
		}
	} else {
		run("encoder", func() error { return encoder.Run(ctx, cfg, log) })
		run("prefill", func() error { return prefill.Run(ctx, prefill.Config{Stage: cfg}, log) })
		run("decoder", func() error { return decoder.Run(ctx, decoder.Config{Stage: two}, log) })
	}
	run("gateway", func() error {
		return gateway.Run(ctx, gateway.Config{
			HTTP: fmt.Sprintf("127.0.0.1:%d", port), NATSURL: server.URL(), HMMSocket: socket, ModelDir: model,
		}, log)
	})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		resp, err := http.Get(c.url + "/health")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return c
			}
		}
		if time.Now().After(deadline) {
			tb.Fatalf("not healthy: %v", err)
		}
	}
}

type testWriter struct{ tb testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.tb.Logf("%s", p)
	return len(p), nil
}

// The stages as goroutines, some with two NPUs, a mixed load at once: under the race detector, and every answer right.
func TestAllServicesInOneProcess(t *testing.T) {
	t.Parallel()
	t.Run("one role each", func(t *testing.T) { allInOneProcess(t, false) })
	t.Run("all roles each", func(t *testing.T) { allInOneProcess(t, true) })
}

func allInOneProcess(t *testing.T, combined bool) {
	t.Parallel()
	c := inProcess(t, combined)
	var wg sync.WaitGroup
	for _, g := range loadGoldens(t) {
		p := g.params(t)
		p.MaxTokens = openai.Int(320)
		wg.Go(func() {
			s, err := c.stream(context.Background(), p, nil)
			if err != nil || s.text != g.Output {
				t.Errorf("%s: %q, %v; want %q", g.Name, s.text, err, g.Output)
			}
		})
	}
	for i := range 16 {
		p := mixed(t, i)
		p.N = openai.Int(2)
		wg.Go(func() {
			if _, err := c.stream(context.Background(), p, nil); err != nil {
				t.Errorf("mixed request %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	c.expectNoMemory(t)
}
