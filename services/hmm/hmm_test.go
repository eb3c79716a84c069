package hmm_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/leaktest"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/memtest"

	"trireme.dev/services/hmm"
)

const page = mem.HostPage

func TestMain(m *testing.M) {
	if part := os.Getenv(childPart); part != "" {
		os.Exit(child(part))
	}
	leaktest.VerifyTestMain(m)
}

// traced names the tests that memtest.NoLeaks watches.
var traced = map[string]bool{}

// daemon runs an HMM of two NPUs of 64 pages for the length of the test and checks at its end that it left nothing.
func daemon(t testing.TB, change ...func(*hmm.Config)) (*hmm.Daemon, string) {
	t.Helper()
	if !traced[t.Name()] { // by the first daemon of a test, before which nothing is there
		traced[t.Name()] = true
		t.Cleanup(func() { delete(traced, t.Name()) })
		memtest.NoLeaks(t)
	}
	dir, err := os.MkdirTemp("", "hmm") // shorter than t.TempDir, whose name may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	cfg := hmm.Config{Socket: filepath.Join(dir, "s"), Node: "n1", NPUs: 2, NPUBytes: 64 * page, HostBytes: 64 * page}
	for _, f := range change {
		f(&cfg)
	}
	d, err := hmm.New(cfg, quiet())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if err := os.Remove(dir); err != nil { // fails if the socket is still there
			t.Error(err)
		}
	})
	return d, cfg.Socket
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// mapOf is the address of an object's extent.
func mapOf(o *hbm.Object) uintptr { return uintptr(unsafe.Pointer(&o.Bytes()[0])) }

func dial(t testing.TB, socket string, h hbm.Hello) *hbm.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if h.Instance == "" {
		h.Instance = "i1"
	}
	if h.Role == "" {
		h.Role = "prefill"
	}
	c, err := hbm.Dial(ctx, socket, h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return c
}

func alloc(t testing.TB, c *hbm.Client, specs ...hbm.Spec) []*hbm.Object {
	t.Helper()
	o, err := c.Alloc(t.Context(), specs...)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func attach(t testing.TB, c *hbm.Client, a mem.Access, npu int, h ...mem.Handle) []*hbm.Object {
	t.Helper()
	o, err := c.Attach(t.Context(), a, npu, h...)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func free(t testing.TB, c *hbm.Client, o ...*hbm.Object) {
	t.Helper()
	if err := c.Free(t.Context(), o...); err != nil {
		t.Fatal(err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error is %v, want %v", err, want)
	}
}

// eventually waits for what another process or goroutine brings about.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

func kv(npu int, bytes int64) hbm.Spec { return hbm.Spec{Kind: mem.KindKV, NPU: npu, Bytes: bytes} }

func ref(request string, attempt int) hbm.Ref {
	return hbm.Ref{Request: request, Attempt: attempt, Left: time.Minute}
}

func fill(o *hbm.Object, seed byte) {
	for i := range o.Bytes() {
		o.Bytes()[i] = seed + byte(i*7)
	}
}

// empty fails the test unless all memory is free.
func empty(t testing.TB, d *hmm.Daemon) {
	t.Helper()
	s := d.Stats()
	if s.Objects != 0 || s.Holds != 0 || s.Claims != 0 {
		t.Errorf("left: %d objects, %d holds, %d claims", s.Objects, s.Holds, s.Claims)
	}
	for _, n := range s.Memory {
		if n.Used != 0 || n.Padded != 0 || n.Free != n.Capacity {
			t.Errorf("NPU %d: %+v", n.NPU, n)
		}
		for k, u := range n.Kinds {
			if u.Used != 0 || u.Padded != 0 {
				t.Errorf("NPU %d, %s: %+v", n.NPU, k, u)
			}
		}
	}
}
