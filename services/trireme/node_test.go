package main

import (
	"encoding/json"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/wire"
)

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
	if _, err := nc.Subscribe(wire.SubjectHMM, func(m *nats.Msg) { _ = m.Respond(stats) }); err != nil {
		t.Fatal(err)
	}
	// What cannot be read, as of another version, says nothing, and is nobody's end.
	if _, err := nc.Subscribe(wire.SubjectHMM, func(m *nats.Msg) { _ = m.Respond([]byte("{")) }); err != nil {
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
