package main

import (
	"encoding/json"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/wire"
)

// Credentials that NATS refuses are the error of an HMM that starts, at once.
func TestHMMWithRefusedCredentials(t *testing.T) {
	s, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, Username: "me", Password: "sesame", NoLog: true, NoSigs: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(s.Shutdown)
	if !s.ReadyForConnections(time.Minute) {
		t.Fatal("NATS does not start")
	}
	at := s.Addr().String()
	text, status := said("hmm", "--nats-url", "nats://me:wrong@"+at, "--socket", filepath.Join(t.TempDir(), "hmm.sock"))
	if status != exitFailed || text != "trireme hmm: connecting to NATS at nats://xxxxx@"+at+": nats: Authorization Violation\n" {
		t.Errorf("status %d, %s", status, text)
	}
}

// An HMM does not start under the name of a node whose HMM answers on the same NATS: handles name nodes.
func TestTwoNodesOfOneName(t *testing.T) {
	url := bustest.Run(t).URL()
	nc, err := nats.Connect(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	quiet := slog.New(slog.DiscardHandler)
	if others, err := otherNodes(t.Context(), nc, "twin", quiet); len(others) > 0 || err != nil {
		t.Errorf("with no other node: %q, %v", others, err)
	}
	stats, err := json.Marshal(hbm.Stats{Node: "twin"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nc.Subscribe(wire.SubjectHMM, func(m *nats.Msg) {
		_ = m.Respond(stats)
		// What cannot be read, as of another version, says nothing, and is nobody's end. It comes right behind the other one: whoever has an answer
		// waits for more for a moment only.
		_ = m.Respond([]byte("{"))
	}); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	if others, err := otherNodes(t.Context(), nc, "other", quiet); !slices.Equal(others, []string{"twin"}) || err != nil {
		t.Errorf("beside another node: %q, %v", others, err)
	}
	text, status := said("hmm", "--nats-url", url, "--node", "twin", "--socket", filepath.Join(t.TempDir(), "hmm.sock"))
	if status != exitUsage || !strings.Contains(text, "calls its node twin") || !strings.Contains(text, "--node") {
		t.Errorf("a second node of one name: status %d, %s", status, text)
	}
}
