package main

import (
	"context"
	"fmt"
	"time"

	"trireme.dev/services/scaler/explain"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/wire"
)

// explainCmd tells a decision of the scaler.
type explainCmd struct {
	Event   string `arg:"" optional:"" help:"Id of the decision, or sequence of its event (trireme events --json); by default the last decision."`
	NATSURL string `name:"nats-url" help:"NATS server of the system." default:"nats://127.0.0.1:4222"`
	JSON    bool   `name:"json" help:"Write one JSON object."`
	ackFlag
}

// Help is shown by `trireme explain --help`.
func (explainCmd) Help() string {
	return `Says what the scaler saw when it decided, what it thought about and what each would have led to, what it chose and why, and what came of it: how
it was made, and how the fleet did afterwards beside what was expected.

Examples:
  trireme explain
  trireme explain k3f9x2m1ab7q
  trireme explain 1234 --json | jq '.outcome.measured'`
}

// Run reads the events and tells.
func (c *explainCmd) Run(e *env) error {
	ctx, cancel := context.WithTimeout(e.ctx, 10*time.Second)
	defer cancel()
	b, err := look(ctx, c.NATSURL, "explain", c.ackFlag)
	if err != nil {
		return err
	}
	defer b.Close()
	var events []wire.Event
	err = b.Events(ctx, bus.EventQuery{Kinds: []string{wire.EventScalerDecision, wire.EventScalerOutcome, "scale"}}, func(ev wire.Event) error {
		events = append(events, ev)
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading what the scaler has decided: %w", err)
	}
	s, err := explain.Find(events, c.Event)
	if err != nil {
		return err
	}
	if c.JSON {
		return writeJSON(e.out, s)
	}
	return s.Write(e.out)
}
