package transfer_test

import (
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/transfer"
	"trireme.dev/shared/transfer/transfertest"
)

func TestThousandConnections(t *testing.T) {
	s := newShelf()
	server, addr := serve(t, transfer.ServerConfig{Source: s, PeerConnections: 20})
	h := s.put(100, true)
	c := connect(t, addr, transfer.ClientConfig{Retries: 1000})
	pull(t, c, s, h) // its connection stays
	var open []net.Conn
	for range 1000 {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, conn)
	}
	until(t, "the surplus to be refused", func() bool { return server.Stats().Refused == 981 })
	answer, err := io.ReadAll(open[999])
	if err != nil || len(answer) < 24 || answer[0] != 4 || answer[1] != 3 { // failure, exhausted
		t.Errorf("the last was told %x, %v", answer, err)
	}
	if n := server.Stats().Connections; n != 20 {
		t.Errorf("%d connections are served, want 20", n)
	}
	pull(t, c, s, h) // who is in is not harmed
	late := connect(t, addr, transfer.ClientConfig{Retries: 2})
	if err := late.Pull(t.Context(), h, make([]byte, 100), nil); !errors.Is(err, mem.ErrExhausted) {
		t.Errorf("one more: %v, want ErrExhausted", err)
	}
	for _, conn := range open {
		_ = conn.Close()
	}
	until(t, "room", func() bool { return server.Stats().Connections == 1 })
	pull(t, late, s, h)
}

func TestGarbageEndsTheConnection(t *testing.T) {
	s := newShelf()
	server, addr := serve(t, transfer.ServerConfig{Source: s})
	h := s.put(mib, true)
	c := connect(t, addr, transfer.ClientConfig{})
	for i, in := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		string(make([]byte, 1000)),
		transfer.Hello + "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		transfer.Hello + transfer.Hello,
		transfer.Hello + transfer.OversizedRequest,
		transfer.Hello + transfer.RequestOfNoHandle,
	} {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte(in)); err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, conn) // until the server closes, or resets
		_ = conn.Close()
		until(t, "it to be counted", func() bool { return server.Stats().Malformed == int64(i+1) })
	}
	pull(t, c, s, h)
}

func TestSilentTakerIsDropped(t *testing.T) {
	server, addr := serve(t, transfer.ServerConfig{Source: newShelf(), Handshake: 10 * time.Millisecond, Idle: 10 * time.Millisecond})
	for _, first := range []string{"", transfer.Hello} {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte(first)) // whoever is slow finds it closed already
		_, _ = io.Copy(io.Discard, conn) // until the server closes, or resets
		_ = conn.Close()
	}
	until(t, "nobody to be connected", func() bool { return server.Stats().Connections == 0 })
}

func TestAnotherVersion(t *testing.T) {
	_, addr := serve(t, transfer.ServerConfig{Source: newShelf()})
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Write([]byte(transfer.HelloOf(99))); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil || len(answer) < 48 || string(answer[:24]) != transfer.Hello || answer[24] != 4 || answer[25] != 10 {
		t.Errorf("answer %x, %v", answer, err)
	}

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { // a server of the future
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = conn.Write([]byte(transfer.HelloOf(2)))
		_, _ = io.Copy(io.Discard, conn)
		_ = conn.Close()
	}()
	c := connect(t, l.Addr().String(), transfer.ClientConfig{})
	if err := c.Pull(t.Context(), mem.Handle{Node: "n1", Object: 1, Bytes: 1}, make([]byte, 1), nil); !errors.Is(err, transfer.ErrVersion) {
		t.Errorf("%v, want ErrVersion", err)
	}
	_ = l.Close()
	<-done
}

func TestMutualTLS(t *testing.T) {
	dir := t.TempDir()
	ca, caKey := transfertest.Issue(t, dir, "ca", nil, nil)
	transfertest.Issue(t, dir, "n1", ca, caKey)
	transfertest.Issue(t, dir, "n2", ca, caKey)
	transfertest.Issue(t, dir, "stranger", nil, nil)
	load := func(name string) (cfg transfer.ClientConfig) {
		t.Helper()
		secure, err := transfer.MutualTLS(filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key"), filepath.Join(dir, "ca.crt"))
		if err != nil {
			t.Fatal(err)
		}
		cfg.TLS, cfg.Retries = secure, 2
		return cfg
	}
	s := newShelf()
	server, addr := serve(t, transfer.ServerConfig{Source: s, TLS: load("n1").TLS})
	h := s.put(10*mib+7, true)
	good := connect(t, addr, load("n2"))
	pull(t, good, s, h)
	pull(t, good, s, h)

	for name, tc := range map[string]struct {
		cfg  transfer.ClientConfig
		node string
	}{
		"certificate of another authority": {load("stranger"), "n1"},
		"no TLS":                           {transfer.ClientConfig{Retries: 2}, "n1"},
		"server is another node":           {load("n2"), "n3"},
	} {
		spans := server.Stats().Spans
		other := h
		other.Node = tc.node
		if err := connect(t, addr, tc.cfg).Pull(t.Context(), other, make([]byte, h.Bytes), nil); err == nil {
			t.Errorf("%s: no error", name)
		}
		if n := server.Stats().Spans; n != spans {
			t.Errorf("%s: %d spans were sent", name, n-spans)
		}
	}
	if _, err := transfer.MutualTLS(filepath.Join(dir, "n1.crt"), filepath.Join(dir, "n2.key"), filepath.Join(dir, "ca.crt")); err == nil {
		t.Error("a key of another certificate was taken")
	}
	if _, err := transfer.MutualTLS(filepath.Join(dir, "n1.crt"), filepath.Join(dir, "n1.key"), filepath.Join(dir, "n1.key")); err == nil {
		t.Error("a file without certificates was taken as the authority")
	}
}
