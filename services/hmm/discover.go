package hmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// lookupTimeout is how long another node's HMM may take to say where it serves.
const lookupTimeout = 2 * time.Second

// peerAddress is where another node's HMM serves objects: as the configuration says, or else as that HMM itself says on
// NATS, in its stats. It is asked before each connection, so a node may move.
func (d *Daemon) peerAddress(ctx context.Context, node string) (string, error) {
	if addr, ok := d.cfg.Peers.Known[node]; ok {
		return addr, nil
	}
	if d.cfg.NATS == nil {
		return "", fmt.Errorf("no address of node %q is known, and there is no NATS to ask: %w", node, mem.ErrLost)
	}
	if !validNode.MatchString(node) {
		return "", fmt.Errorf("node %.70q cannot be: %w", node, mem.ErrInvalid)
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	m, err := d.cfg.NATS.RequestWithContext(ctx, SubjectStats(node), nil)
	if errors.Is(err, nats.ErrNoResponders) {
		return "", fmt.Errorf("no HMM of node %q is on NATS: %w", node, mem.ErrLost)
	}
	if err != nil {
		return "", fmt.Errorf("asking node %q where it serves: %w: %w", node, mem.ErrLost, err)
	}
	var s protocol.Stats
	if err := json.Unmarshal(m.Data, &s); err != nil {
		return "", fmt.Errorf("node %q says where it serves: %w: %w", node, mem.ErrInvalid, err)
	}
	if s.Peer == "" {
		return "", fmt.Errorf("the HMM of node %q serves no other nodes (start it with --peer-listen): %w", node, mem.ErrLost)
	}
	return s.Peer, nil
}

// announced is the address that other nodes are told, empty when they are not served. An HMM that listens on all its
// addresses announces the one from which NATS sees it.
func (d *Daemon) announced() string {
	addr := d.PeerAddress()
	switch {
	case addr == nil:
		return ""
	case d.cfg.Peers.Announce != "":
		return d.cfg.Peers.Announce
	}
	host, port, err := net.SplitHostPort(addr.String())
	if err != nil {
		return addr.String()
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsUnspecified() || d.cfg.NATS == nil {
		return addr.String()
	}
	ip, err := d.cfg.NATS.GetClientIP()
	if err != nil {
		return "" // not connected now, so nobody hears it
	}
	return net.JoinHostPort(ip.String(), port)
}
