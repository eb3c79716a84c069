package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/wire"
)

// deadCmd looks after dead letters.
type deadCmd struct {
	List   deadListCmd   `cmd:"" help:"List them, newest first."`
	Show   deadShowCmd   `cmd:"" help:"Show one of them, or the body of its request."`
	Replay deadReplayCmd `cmd:"" help:"Send the request of one of them again, as a new request, and print the answer."`
	Purge  deadPurgeCmd  `cmd:"" help:"Delete one, all, or old ones, with their requests."`
}

// Help is shown by `trireme dead --help`.
func (deadCmd) Help() string {
	return `Dead letters are requests that failed for good and not by their clients' fault: quarantined because instances died while they
ran them, lost in all attempts, or refused by a stage. They are kept for 24 hours, with body and pictures unless the gateway was
started with --dead-letters facts or off.

Examples:
  trireme dead list
  trireme dead show mawb3k2xq7f2a
  trireme dead replay mawb3k2xq7f2a        once its cause is mended
  trireme dead purge --older 6h`
}

// deadFlags are what all its commands need.
type deadFlags struct {
	NATSURL string `name:"nats-url" help:"NATS server of the system." default:"nats://127.0.0.1:4222"`
	ackFlag
}

// with connects and calls f.
func (d *deadFlags) with(ctx context.Context, f func(ctx context.Context, b *bus.Bus) error) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	b, err := look(ctx, d.NATSURL, "dead", d.ackFlag)
	if err != nil {
		return err
	}
	defer b.Close()
	return f(ctx, b)
}

// look connects a command that looks at a running system: unlike the services, it does not wait for a NATS that is not there.
func look(ctx context.Context, url, name string, a ackFlag) (*bus.Bus, error) {
	return lookAndTell(ctx, slog.New(slog.DiscardHandler), url, name, a)
}

// lookAndTell is look for a command that stays: log gets what happens to the connection.
func lookAndTell(ctx context.Context, log *slog.Logger, url, name string, a ackFlag) (*bus.Bus, error) {
	b, err := bus.Look(ctx, url, name, log, bus.WithAckWait(a.AckWait), bus.WithReplicas(a.Replicas))
	if errors.Is(err, bus.ErrUnreachable) {
		_, why, _ := strings.Cut(err.Error(), bus.ErrUnreachable.Error()+": ")
		return nil, fmt.Errorf("no NATS at %s (%s): start everything with `trireme up`, or say where with --nats-url", bus.Redacted(url), why)
	}
	return b, err
}

// explainLetter adds the remedy to an error about a dead letter.
func explainLetter(err error) error {
	switch {
	case errors.Is(err, bus.ErrNoLetter):
		return fmt.Errorf("%w: they live for 24 hours; `trireme dead list` shows those that there are", err)
	case errors.Is(err, bus.ErrNoRequest):
		return fmt.Errorf("%w; `trireme dead show` tells what is known of it", err)
	}
	return err
}

type deadListCmd struct {
	Tenant *string `help:"Those of a tenant only; an empty one for requests that named none." placeholder:"NAME"`
	Limit  int     `help:"Most letters that are shown." default:"50"`
	JSON   bool    `name:"json" help:"Write one JSON object."`
	deadFlags
}

// Help is shown by `trireme dead list --help`.
func (deadListCmd) Help() string {
	return `Examples:
  trireme dead list
  trireme dead list --tenant search --limit 10
  trireme dead list --json | jq -r '.letters[] | select(.reason == "quarantined") | .id'`
}

// deadList is what `dead list --json` writes.
type deadList struct {
	Letters []wire.DeadLetter `json:"letters"`
	All     int               `json:"all"` // that there are, shown or not
}

// Run lists dead letters.
func (c *deadListCmd) Run(e *env) error {
	if c.Limit < 1 || c.Limit > 10_000 {
		return fmt.Errorf("%w--limit %d, must be 1 to 10000", errUsage, c.Limit)
	}
	return c.with(e.ctx, func(ctx context.Context, b *bus.Bus) error {
		letters, all, err := b.Letters(ctx, bus.Dead{Tenant: c.Tenant}, c.Limit)
		if err != nil {
			return err
		}
		if c.JSON {
			return writeJSON(e.out, deadList{append([]wire.DeadLetter{}, letters...), all})
		}
		if all == 0 {
			_, err := fmt.Fprintln(e.out, "no dead letters")
			return err
		}
		t := tabwriter.NewWriter(e.out, 0, 4, 2, ' ', 0)
		fmt.Fprintln(t, "ID\tAGE\tREASON\tSTAGE\tATTEMPTS\tTENANT\tREQUEST\tERROR")
		for _, l := range letters {
			fmt.Fprintf(t, "%s\t%v\t%s\t%s\t%d\t%s\t%s\t%s\n", l.ID, time.Since(l.Time).Round(time.Second), l.Reason, dash(l.Stage), l.Attempts,
				dash(l.Tenant), kept(&l), oneLine(l.Error, 60))
		}
		if len(letters) < all {
			fmt.Fprintf(t, "\n%d of %d; --limit shows more\n", len(letters), all)
		}
		return t.Flush()
	})
}

// kept says how much of a letter's request there is.
func kept(l *wire.DeadLetter) string {
	if l.Body == 0 {
		return "not kept"
	}
	n := l.Body
	for _, p := range l.Fetched {
		n += p.Bytes
	}
	return conf.Bytes(n).String()
}

// oneLine is the beginning of a text as one line.
func oneLine(s string, most int) string {
	r := []rune(strings.Join(strings.Fields(s), " "))
	if len(r) > most {
		return string(r[:most-1]) + "…"
	}
	return string(r)
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

type deadShowCmd struct {
	ID   string `arg:"" help:"Dead letter, as list shows it."`
	Body bool   `help:"Write the body of its request, as it came, and nothing else." xor:"what"`
	JSON bool   `name:"json" help:"Write one JSON object." xor:"what"`
	deadFlags
}

// Help is shown by `trireme dead show --help`.
func (deadShowCmd) Help() string {
	return `Examples:
  trireme dead show mawb3k2xq7f2a
  trireme dead show mawb3k2xq7f2a --body | jq '.messages[-1]'`
}

// Run shows a dead letter.
func (c *deadShowCmd) Run(e *env) error {
	return c.with(e.ctx, func(ctx context.Context, b *bus.Bus) error {
		l, err := b.Letter(ctx, c.ID)
		switch {
		case err != nil:
			return explainLetter(err)
		case c.Body:
			body, _, err := b.Request(ctx, l)
			if err != nil {
				return explainLetter(err)
			}
			_, err = e.out.Write(body)
			return err
		case c.JSON:
			return writeJSON(e.out, l)
		}
		return showLetter(e.out, l)
	})
}

func showLetter(w io.Writer, l *wire.DeadLetter) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	line := func(name string, v any) {
		if text := fmt.Sprint(v); text != "" {
			fmt.Fprintf(t, "%s\t%s\n", name, text)
		}
	}
	line("letter", l.ID)
	line("failed", l.Time.Local().Format(time.RFC3339))
	line("reason", l.Reason)
	line("error", oneLine(l.Error, 4096))
	line("answered", strings.TrimSpace(fmt.Sprint(l.Status, " ", l.Code)))
	line("stage", l.Stage)
	line("attempts", l.Attempts)
	line("trace", l.Trace)
	line("request", l.Request)
	line("replay of", l.ReplayOf)
	line("tenant", l.Tenant)
	line("class", l.Class)
	line("model", l.Model)
	line("gateway", l.Gateway)
	line("path", l.Path)
	line("prompt", fmt.Sprintf("%d tokens, %d pictures", l.PromptTokens, l.Pictures))
	for _, name := range slices.Sorted(maps.Keys(l.Headers)) {
		line("header", name+": "+l.Headers[name])
	}
	if l.Body > 0 {
		line("body", conf.Bytes(l.Body))
	} else {
		line("body", "not kept: "+l.Missing)
	}
	for _, p := range l.Fetched {
		line("fetched", fmt.Sprintf("%v from %s", conf.Bytes(p.Bytes), p.URL))
	}
	return t.Flush()
}

type deadPurgeCmd struct {
	ID     []string      `arg:"" optional:"" help:"Dead letters, as list shows them."`
	All    bool          `help:"All of them." env:"-"` // what deletes is said, and not set for all commands
	Older  time.Duration `help:"Those that are older." placeholder:"6h"`
	Tenant *string       `help:"With --all or --older: those of a tenant only; an empty one for requests that named none." placeholder:"NAME"`
	JSON   bool          `name:"json" help:"Write one JSON object."`
	deadFlags
}

// Help is shown by `trireme dead purge --help`.
func (deadPurgeCmd) Help() string {
	return `Examples:
  trireme dead purge mawb3k2xq7f2a
  trireme dead purge --older 6h
  trireme dead purge --all --tenant search`
}

// Run deletes dead letters.
func (c *deadPurgeCmd) Run(e *env) error {
	some := c.All || c.Older != 0
	switch {
	case len(c.ID) > 0 && (some || c.Tenant != nil):
		return fmt.Errorf("%wname letters, or select them with --all, --older and --tenant, not both", errUsage)
	case len(c.ID) == 0 && !some:
		return fmt.Errorf("%wsay which: a letter's id, --older 6h, or --all", errUsage)
	case c.Older < 0 || c.All && c.Older != 0:
		return fmt.Errorf("%w--older %v: it is a time above 0, without --all", errUsage, c.Older)
	}
	return c.with(e.ctx, func(ctx context.Context, b *bus.Bus) error {
		n := 0
		for _, id := range c.ID {
			if err := b.PurgeLetter(ctx, id); err != nil {
				return explainLetter(err)
			}
			n++
		}
		if some {
			d := bus.Dead{Tenant: c.Tenant}
			if c.Older > 0 {
				d.Before = time.Now().Add(-c.Older)
			}
			var err error
			if n, err = b.PurgeLetters(ctx, d); err != nil {
				return err
			}
		}
		if c.JSON {
			return writeJSON(e.out, struct {
				Deleted int `json:"deleted"`
			}{n})
		}
		_, err := fmt.Fprintf(e.out, "%d deleted\n", n)
		return err
	})
}
