package hbm

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/leaktest"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/host"
	"trireme.dev/shared/mem/memtest"
)

// The client with a real daemon is tested in services/hmm; here it meets what a real daemon does not do.

func TestMain(m *testing.M) { leaktest.VerifyTestMain(m) }

// fake listens, answers one hello with what reply makes of it, and closes.
func fake(t *testing.T, reply func(conn *net.UnixConn, id uint64)) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	go func() {
		defer close(done)
		conn, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer conn.Close()
		payload, err := protocol.ReadFrame(conn)
		if err != nil {
			t.Errorf("reading the hello: %v", err)
			return
		}
		id, _, _, err := protocol.ParseRequest(payload)
		if err != nil {
			t.Errorf("parsing the hello: %v", err)
		}
		reply(conn, id)
	}()
	return socket
}

func frame(t *testing.T, id uint64, failure error, body any) []byte {
	t.Helper()
	p, err := protocol.Reply(id, failure, body)
	if err != nil {
		t.Error(err)
	}
	return p
}

func TestDialMeetsStrangers(t *testing.T) {
	table, err := host.NewTable("test-table", 16)
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	store, err := host.NewStore("test-store", mem.HostPage, mem.HostPage, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	fds := unix.UnixRights(int(table.File().Fd()), int(store.File().Fd()))
	good := protocol.Welcome{Version: protocol.Version, Node: "n", Slots: 16, Spaces: []protocol.Space{{Page: mem.HostPage, Bytes: mem.HostPage}}}
	for name, tc := range map[string]struct {
		change func(*protocol.Welcome)
		fds    []byte
		want   string
	}{
		"other version":    {func(w *protocol.Welcome) { w.Version++ }, fds, "versions differ"},
		"no descriptors":   {func(*protocol.Welcome) {}, nil, "0 descriptors"},
		"one missing":      {func(w *protocol.Welcome) { w.Spaces = append(w.Spaces, w.Spaces[0]) }, fds, "2 descriptors"},
		"no board":         {func(w *protocol.Welcome) { w.Board = true }, fds, "and 1 boards"},
		"small space":      {func(w *protocol.Welcome) { w.Spaces[0].Bytes = 1 << 40 }, fds, "were promised"},
		"negative space":   {func(w *protocol.Welcome) { w.Spaces[0].Bytes = -mem.HostPage }, fds, "not whole pages"},
		"small table":      {func(w *protocol.Welcome) { w.Slots = 1 << 40 }, fds, "were promised"},
		"negative table":   {func(w *protocol.Welcome) { w.Slots = -1 }, fds, "-1 words"},
		"too many to hold": {func(w *protocol.Welcome) { w.Slots = 1 << 61 }, fds, "words"},
	} {
		t.Run(name, func(t *testing.T) {
			memtest.NoLeaks(t)
			w := good
			w.Spaces = []protocol.Space{good.Spaces[0]}
			tc.change(&w)
			socket := fake(t, func(conn *net.UnixConn, id uint64) {
				if _, _, err := conn.WriteMsgUnix(frame(t, id, nil, w), tc.fds, nil); err != nil {
					t.Error(err)
				}
			})
			_, err := Dial(t.Context(), socket, Hello{Instance: "i", Role: "decode"})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Dial: %v, want %q", err, tc.want)
			}
		})
	}
	for name, bytes := range map[string]string{"text": "SSH-2.0-OpenSSH\r\n", "nothing": "", "half": "\x00\x00"} {
		t.Run(name, func(t *testing.T) {
			memtest.NoLeaks(t)
			socket := fake(t, func(conn *net.UnixConn, _ uint64) { _, _ = conn.Write([]byte(bytes)) })
			if c, err := Dial(t.Context(), socket, Hello{Instance: "i", Role: "decode"}); err == nil {
				t.Errorf("connected: %v", c.Close())
			}
		})
	}

	// A good welcome, then the last word: everything fails with ErrLost and says why.
	t.Run("last word", func(t *testing.T) {
		memtest.NoLeaks(t)
		socket := fake(t, func(conn *net.UnixConn, id uint64) {
			if _, _, err := conn.WriteMsgUnix(frame(t, id, nil, good), fds, nil); err != nil {
				t.Error(err)
			}
			if _, err := conn.Write(frame(t, 0, errors.New("tired of you"), nil)); err != nil {
				t.Error(err)
			}
		})
		c, err := Dial(t.Context(), socket, Hello{Instance: "i", Role: "decode"})
		if err != nil {
			t.Fatal(err)
		}
		<-c.Lost()
		if err := c.End(t.Context(), "r"); !errors.Is(err, mem.ErrLost) || !strings.Contains(err.Error(), "tired of you") {
			t.Errorf("call on a lost connection: %v", err)
		}
		for range 2 {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}
