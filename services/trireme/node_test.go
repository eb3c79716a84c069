package main

import (
	"encoding/json"
	"path/filepath"
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
	if err := alone(t.Context(), nc, "twin"); err != nil {
		t.Errorf("with no other node: %v", err)
	}
	stats, err := json.Marshal(hbm.Stats{Node: "twin"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nc.Subscribe(wire.SubjectHMM, func(m *nats.Msg) { _ = m.Respond(stats) }); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := alone(t.Context(), nc, "other"); err != nil {
		t.Errorf("beside another node: %v", err)
	}
	text, status := said("hmm", "--nats-url", url, "--node", "twin", "--socket", filepath.Join(t.TempDir(), "hmm.sock"))
	if status != exitUsage || !strings.Contains(text, "calls its node twin") || !strings.Contains(text, "--node") {
		t.Errorf("a second node of one name: status %d, %s", status, text)
	}
}
