package hmm_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm"
)

func raw(t testing.TB, socket string) *net.UnixConn {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	must(t, conn.SetDeadline(time.Now().Add(time.Minute)))
	return conn
}

func send(t testing.TB, conn net.Conn, id uint64, op protocol.Op, body any) {
	t.Helper()
	frame, err := protocol.Request(id, op, body)
	must(t, err)
	_, err = conn.Write(frame)
	must(t, err)
}

func answer(t testing.TB, conn net.Conn) (uint64, error) {
	t.Helper()
	payload, err := protocol.ReadFrame(conn)
	must(t, err)
	id, _, failure, err := protocol.ParseReply(payload)
	must(t, err)
	return id, failure
}

func hello(version int) protocol.Hello {
	return protocol.Hello{Version: version, Instance: "raw", Role: "decode"}
}

// works shows that the HMM serves others.
func works(t testing.TB, socket string) {
	t.Helper()
	c := dial(t, socket, hbm.Hello{Instance: "good"})
	free(t, c, alloc(t, c, kv(1, page))...)
	must(t, c.Close())
}

func TestGarbageInsteadOfHello(t *testing.T) {
	_, socket := daemon(t)
	other, err := protocol.Request(1, protocol.OpStats, nil)
	must(t, err)
	for name, garbage := range map[string][]byte{
		"http":        []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"too long":    binary.BigEndian.AppendUint32(nil, protocol.MaxFrame+1),
		"no msgpack":  append([]byte{0, 0, 0, 3}, 0xc1, 0xc1, 0xc1),
		"huge array":  append([]byte{0, 0, 0, 8}, "\x93\x01\x02\xdd\xff\xff\xff\xff"...),
		"not a hello": other,
	} {
		conn := raw(t, socket)
		_, err := conn.Write(garbage)
		must(t, err)
		id, failure := answer(t, conn)
		if id != 0 || !errors.Is(failure, mem.ErrInvalid) {
			t.Errorf("%s: answer %d, %v", name, id, failure)
		}
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Errorf("%s: the connection goes on", name)
		}
	}
	works(t, socket)
}

func TestGarbageAfterHello(t *testing.T) {
	d, socket := daemon(t)
	conn := raw(t, socket)
	send(t, conn, 1, protocol.OpHello, hello(protocol.Version))
	if id, failure := answer(t, conn); id != 1 || failure != nil {
		t.Fatalf("welcome %d, %v", id, failure)
	}
	// Good frames with bad bodies are answered, and the connection goes on.
	for i, tc := range []struct {
		op   protocol.Op
		body any
	}{
		{protocol.OpAlloc, "text"}, {protocol.OpAttach, []int{1, 2, 3}}, {protocol.OpSeal, 7}, {protocol.OpClaim, "x"},
		{protocol.OpEnd, ""}, {protocol.OpHello, hello(1)}, {200, nil}, {0, nil},
		{protocol.OpFree, []protocol.Object{{ID: 1, Generation: 2}}},
		{protocol.OpKeep, protocol.Keep{Ref: ref("r", 1), Objects: []protocol.Object{{ID: 1}}}},
		{protocol.OpClaim, protocol.Claim{Part: hbm.Part{Request: "r", Attempt: -1, Stage: "s"}}},
	} {
		id := uint64(i + 2)
		send(t, conn, id, tc.op, tc.body)
		if got, failure := answer(t, conn); got != id || !errors.Is(failure, mem.ErrInvalid) {
			t.Errorf("op %d with body %v: answer %d, %v", tc.op, tc.body, got, failure)
		}
	}
	if _, err := conn.Write(bytes.Repeat([]byte{0xff}, 100)); err != nil {
		t.Fatal(err)
	}
	if id, failure := answer(t, conn); id != 0 || failure == nil {
		t.Errorf("garbage: answer %d, %v", id, failure)
	}
	eventually(t, "the connection is dropped", func() bool { return d.Stats().Connections == 0 })
	works(t, socket)
}

func TestVersions(t *testing.T) {
	_, socket := daemon(t)
	conn := raw(t, socket)
	send(t, conn, 1, protocol.OpHello, hello(99))
	_, failure := answer(t, conn)
	if !errors.Is(failure, hbm.ErrVersion) || !strings.Contains(failure.Error(), "99") || !strings.Contains(failure.Error(), fmt.Sprint(protocol.Version)) {
		t.Errorf("version 99: %v", failure)
	}
}

func TestBadHello(t *testing.T) {
	_, socket := daemon(t)
	dial(t, socket, hbm.Hello{Instance: "holder", NPUs: 1})
	for _, tc := range []struct {
		h    hbm.Hello
		want error
	}{
		{hbm.Hello{Instance: "x", Role: "decode", NPUs: 2}, mem.ErrExhausted},
		{hbm.Hello{Instance: "x", Role: "decode", NPUs: -1}, mem.ErrInvalid},
		{hbm.Hello{Instance: "x", Role: "gateway", NPUs: 1}, mem.ErrInvalid},
		{hbm.Hello{Role: "decode"}, mem.ErrInvalid},
		{hbm.Hello{Instance: "x"}, mem.ErrInvalid},
		{hbm.Hello{Instance: strings.Repeat("x", 200), Role: "decode"}, mem.ErrInvalid},
	} {
		_, err := hbm.Dial(t.Context(), socket, tc.h)
		wantErr(t, err, tc.want)
		if tc.want == mem.ErrExhausted && !strings.Contains(err.Error(), "1 of 2 are free") {
			t.Errorf("error %q does not say how many NPUs are free", err)
		}
	}
	works(t, socket)
}

func TestClientThatNeverReads(t *testing.T) {
	d, socket := daemon(t, func(c *hmm.Config) { c.WriteTimeout = time.Second })
	conn := raw(t, socket)
	send(t, conn, 1, protocol.OpHello, hello(protocol.Version))
	eventually(t, "it is connected", func() bool { return d.Stats().Connections == 1 })
	frame, err := protocol.Request(2, protocol.OpStats, nil)
	must(t, err)
	for err == nil { // until the HMM has had enough
		_, err = conn.Write(frame)
	}
	if os.IsTimeout(err) {
		t.Fatal("the HMM still reads from one who does not")
	}
	eventually(t, "it is dropped", func() bool { return d.Stats().Connections == 0 })
	works(t, socket)
}

func TestLost(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	cfg := hmm.Config{Socket: socket, Node: "n1", NPUs: 1, NPUBytes: 8 * page, HostBytes: 8 * page}
	go func() { ended <- hmm.Run(ctx, cfg, quiet()) }()
	c := dial(t, socket, hbm.Hello{})
	o := alloc(t, c, kv(0, page))[0]
	k := claim(t, c, decodePart("r", 1, 0), "")
	h := o.Handle()
	o.Bytes()[0] = 7
	stop()
	must(t, <-ended)
	<-c.Lost()
	if k.Held() {
		t.Error("a claim is held without an HMM")
	}
	if o.Bytes()[0] != 7 {
		t.Error("the map of a lost client cannot be read")
	}
	_, err := c.Alloc(t.Context(), kv(0, 1))
	wantErr(t, err, mem.ErrLost)
	_, err = c.Stats(t.Context())
	wantErr(t, err, mem.ErrLost)
	wantErr(t, c.Free(t.Context(), o), mem.ErrLost)
	must(t, c.Close())

	// The next HMM does not know the handles of the one before.
	ctx, stop = context.WithCancel(t.Context())
	go func() { ended <- hmm.Run(ctx, cfg, quiet()) }()
	next := dial(t, socket, hbm.Hello{})
	_, err = next.Attach(t.Context(), mem.ReadOnly, -1, h)
	wantErr(t, err, mem.ErrGone)
	alloc(t, next, kv(0, page))
	_, err = next.Attach(t.Context(), mem.ReadOnly, -1, h)
	wantErr(t, err, mem.ErrGone)
	if k2 := claim(t, next, decodePart("r", 1, 0), ""); k2.Generation() <= k.Generation() {
		t.Error("generations fall when the HMM is started again")
	}
	must(t, next.Close())
	stop()
	must(t, <-ended)
}

func TestDialWaits(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	_, err := hbm.Dial(ctx, socket, hbm.Hello{Instance: "x", Role: "decode"})
	wantErr(t, err, context.DeadlineExceeded)

	// A listener that does not answer is given up with ctx too.
	l, err := net.Listen("unix", socket)
	must(t, err)
	defer l.Close()
	ctx, cancel = context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	_, err = hbm.Dial(ctx, socket, hbm.Hello{Instance: "x", Role: "decode"})
	wantErr(t, err, context.DeadlineExceeded)
}

func TestSocket(t *testing.T) {
	_, socket := daemon(t)
	info, err := os.Stat(socket)
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("socket has mode %v", info.Mode())
	}
	cfg := hmm.Config{Socket: socket, Node: "n1", HostBytes: page}
	if _, err := hmm.New(cfg, quiet()); err == nil || !strings.Contains(err.Error(), "another HMM serves "+socket) {
		t.Errorf("a second daemon on one socket: %v", err)
	}
	works(t, socket)

	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, []byte("precious"), 0o600))
	cfg.Socket = file
	if _, err := hmm.New(cfg, quiet()); err == nil {
		t.Error("a file was taken for a socket")
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file was harmed: %q, %v", b, err)
	}

	// The socket of a daemon that was killed is replaced.
	stale := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	must(t, err)
	l.SetUnlinkOnClose(false)
	must(t, l.Close())
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	cfg.Socket = stale
	go func() { ended <- hmm.Run(ctx, cfg, quiet()) }()
	c := dial(t, stale, hbm.Hello{Role: "gateway"})
	free(t, c, alloc(t, c, hbm.Spec{Kind: mem.KindPixels, NPU: mem.HostNPU, Bytes: 5})...)
	must(t, c.Close())
	stop()
	must(t, <-ended)
}

func TestConfig(t *testing.T) {
	good := hmm.Config{Socket: "/tmp/s", Node: "n-1_a", NPUs: 2, NPUBytes: page, HostBytes: page}
	must(t, good.Validate())
	for name, change := range map[string]func(*hmm.Config){
		"socket":       func(c *hmm.Config) { c.Socket = strings.Repeat("x", 108) },
		"no socket":    func(c *hmm.Config) { c.Socket = "" },
		"node":         func(c *hmm.Config) { c.Node = "a.b" },
		"no node":      func(c *hmm.Config) { c.Node = "" },
		"NPUs":         func(c *hmm.Config) { c.NPUs = -1 },
		"bytes of NPU": func(c *hmm.Config) { c.NPUBytes = page - 1 },
		"host bytes":   func(c *hmm.Config) { c.HostBytes = 0 },
		"claims":       func(c *hmm.Config) { c.Claims = -1 },
		"weights":      func(c *hmm.Config) { c.Weights = -page },
	} {
		c := good
		change(&c)
		if c.Validate() == nil {
			t.Errorf("%s: no error", name)
		}
		if _, err := hmm.New(c, quiet()); err == nil {
			t.Errorf("%s: New made a daemon", name)
		}
	}
}

func FuzzSession(f *testing.F) {
	d, socket := daemon(f)
	for _, body := range []any{nil, "x", protocol.Attach{Handles: make([]mem.Handle, 2)}, protocol.Seal{Ref: ref("r", 1)}} {
		for op := protocol.OpHello; op <= protocol.OpBye+1; op++ {
			frame, err := protocol.Request(2, op, body)
			must(f, err)
			f.Add(frame)
		}
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		conn := raw(t, socket)
		send(t, conn, 1, protocol.OpHello, hello(protocol.Version))
		if _, failure := answer(t, conn); failure != nil {
			t.Fatal(failure)
		}
		_, _ = conn.Write(p) // may be refused half way
		_ = conn.CloseWrite()
		if _, err := io.Copy(io.Discard, conn); err != nil && os.IsTimeout(err) {
			t.Fatal("the HMM does not end a session that is over")
		}
		if d.Stats().Node != "n1" {
			t.Fatal("the HMM is down")
		}
	})
}
