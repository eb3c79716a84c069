package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"trireme.dev/shared/bus"
)

// topologyFile is what says in the data folder with which topology `trireme up` was started last.
const topologyFile = "topology"

// forgetLayouts removes what is recorded of how operators have changed the instances of the node, if these are others now: who has killed `up`,
// and starts it with another topology, says who is to have how many NPUs, and an instance that took as many as it had before could leave none to
// others.
func (c *upCmd) forgetLayouts(ctx context.Context, p *plan) error {
	file, now := filepath.Join(c.Data, topologyFile), p.topology.String()+"\n"
	if before, err := os.ReadFile(file); err == nil && string(before) == now {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := bus.Stay(p.natsURL, "up-"+c.node())
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := errors.Join(bus.ForgetLayouts(ctx, conn, c.node()), os.WriteFile(file, []byte(now), 0o600)); err != nil {
		return fmt.Errorf("beginning with topology %s: %w", p.topology, err)
	}
	return nil
}
