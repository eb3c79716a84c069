package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/wire"
)

// eventsCmd shows what has happened.
type eventsCmd struct {
	NATSURL string        `name:"nats-url" help:"NATS server of the system." default:"nats://127.0.0.1:4222"`
	Follow  bool          `help:"Go on with what happens from now on." short:"f"`
	Since   time.Duration `help:"How old the oldest event may be; 0: as old as there are." default:"24h"`
	Last    int           `help:"How many there may be of the past, the latest ones." default:"50" short:"n"`
	All     bool          `help:"All of the past that is kept, whatever --since and --last say."`
	Kind    []string      `help:"Only these kinds, such as instance.gone, or groups, such as instance." placeholder:"KIND"`
	JSON    bool          `name:"json" help:"Write one JSON object a line."`
	ackFlag
}

// Help is shown by `trireme events --help`.
func (eventsCmd) Help() string {
	return `Events are kept for a week in the JetStream stream ` + wire.StreamEvents + `.

Examples:
  trireme events
  trireme events --follow --last 0
  trireme events --kind instance.gone --since 1h
  trireme events --json --all | jq -r 'select(.role == "decode") | .text'`
}

// Run prints events until there are no more, or with --follow until the process is told to end.
func (c *eventsCmd) Run(e *env) error {
	if c.Last < 0 || c.Since < 0 {
		return fmt.Errorf("%w--last and --since cannot be negative", errUsage)
	}
	if c.All {
		c.Last, c.Since = math.MaxInt, 0
	}
	connect, cancel := context.WithTimeout(e.ctx, 5*time.Second)
	defer cancel()
	b, err := lookAndTell(connect, e.log, c.NATSURL, "trireme-events", c.ackFlag)
	if err != nil {
		return err
	}
	defer b.Close()
	show := c.printer(e.out)
	q := bus.EventQuery{Kinds: c.Kind, Since: c.Since}
	var past []wire.Event
	err = b.Events(e.ctx, q, func(ev wire.Event) error {
		past = append(past, ev)
		return nil
	})
	if err != nil {
		return err
	}
	if len(past) == 0 && !c.Follow && !c.JSON {
		fmt.Fprintln(e.err, c.none())
	}
	for _, ev := range past[max(0, len(past)-c.Last):] {
		if err := show(ev); err != nil {
			return err
		}
	}
	if !c.Follow {
		return nil
	}
	q.Follow = true
	if len(past) > 0 {
		q.After = past[len(past)-1].Sequence
	}
	return b.Events(e.ctx, q, show)
}

// none says which events there are none of.
func (c *eventsCmd) none() string {
	s := "no events"
	if len(c.Kind) > 0 {
		s += " of " + strings.Join(c.Kind, ", ")
	}
	if c.Since > 0 {
		since := c.Since.String() // 24h0m0s
		for _, zero := range []string{"m0s", "h0m"} {
			if strings.HasSuffix(since, zero) {
				since = since[:len(since)-2]
			}
		}
		s += fmt.Sprintf(" in the last %s; --all shows all that are kept", since)
	}
	return s
}

// printer returns what writes one event.
func (c *eventsCmd) printer(w io.Writer) func(wire.Event) error {
	if c.JSON {
		enc := json.NewEncoder(w)
		return func(e wire.Event) error { return enc.Encode(e) }
	}
	return func(e wire.Event) error {
		who := e.Instance
		for _, more := range []string{e.Request, e.Node} {
			if who == "" {
				who = more
			}
		}
		_, err := fmt.Fprintf(w, "%s  %-16s  %-20s  %s\n", e.Time.Local().Format("2006-01-02 15:04:05.000"), e.Kind, who,
			strings.ReplaceAll(e.Text, "\n", " "))
		return err
	}
}
