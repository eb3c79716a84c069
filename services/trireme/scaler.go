package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"trireme.dev/services/scaler"
	"trireme.dev/services/scaler/act"
	"trireme.dev/services/scaler/explain"
	"trireme.dev/services/scaler/record"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

type scalerCmd struct {
	Run    scalerRunCmd    `cmd:"" help:"Run the scaler: it decides how many NPUs each stage has."`
	Status scalerStatusCmd `cmd:"" help:"Show what the scaler sees and thinks now."`
	Check  scalerCheckCmd  `cmd:"" help:"Say what a policy file of the scaler means, or what is wrong with it."`
	Replay scalerReplayCmd `cmd:"" help:"Decide anew by a record of what the scaler saw, by another policy if you like."`
}

// scalerRunCmd runs the scaler.
type scalerRunCmd struct {
	NATSURL string `name:"nats-url" help:"NATS server, or those of a cluster with commas between." default:"nats://127.0.0.1:4222"`
	ackFlag
	Mode       string        `help:"off, advise (decisions are told) or auto (they are carried out, too), instead of what the policy says, which is advise by default." enum:",off,advise,auto" default:"" env:"TRIREME_SCALER" placeholder:"MODE"`
	Policy     string        `help:"Policy file, as scaler.yaml; read again when it changes. By default the policy of an empty file." env:"TRIREME_SCALER_POLICY" type:"path" placeholder:"FILE"`
	Record     string        `help:"Write what is seen and decided to a file, for trireme scaler replay. When it is full it is renamed to FILE.1." env:"TRIREME_SCALER_RECORD" type:"path" placeholder:"FILE"`
	RecordSize conf.Bytes    `help:"Size at which the record is full." default:"64MiB"`
	Metrics    string        `help:"Address for /metrics, /live and /health; none by default." placeholder:"ADDR"`
	Lease      time.Duration `help:"Of several scalers, the one that acts is succeeded when it is not heard of for so long." default:"5s" hidden:""`
	Settle     time.Duration `help:"So long after a change its outcome is measured." default:"20s"`

	Processes string            `help:"Who starts and stops processes: up (trireme up), kubernetes (the scale subresource), advise (nobody: the command is told), or auto (kubernetes in a pod, else trireme up on nodes where it runs)." enum:"auto,up,kubernetes,advise" default:"auto" env:"TRIREME_SCALER_PROCESSES"`
	Target    map[string]string `help:"Of kubernetes: what has the pods of instances, by their roles, as D=deployments/decoder or EPD=statefulsets/all. By default deployments/encoder, prefill and decoder. Of advise: their service of docker compose, as EPD=all; by default encoder, prefill or decoder, by the first role." placeholder:"ROLES=NAME" mapsep:"," env:"TRIREME_SCALER_TARGET"`
	Namespace string            `help:"Of kubernetes: the namespace of these; by default the scaler's own." placeholder:"NAME"`
	Rate      conf.Bytes        `name:"copy-rate" help:"Most bytes of weights that a change copies in a second, beside serving; 0: as fast as it goes." default:"0" placeholder:"SIZE"`
	Timeout   time.Duration     `help:"A change of an instance is given up if it is not in force by then." default:"1m"`
}

// Help is shown by `trireme scaler run --help`.
func (scalerRunCmd) Help() string {
	return `Asks gateways, stages, HMMs and queues once a second what arrives, what waits and what NPUs do, and decides which change of the fleet serves
that best: widen or narrow an instance, move an NPU to another role, start, stop or promote an instance, place experts anew, or nothing. Each
decision is an event (trireme events --kind scaler), which trireme explain tells in full. Several may run: one acts, the others stand by.
'trireme up --scaler auto' runs one, too.

Examples:
  trireme scaler run                                      tells what it would do
  trireme scaler run --mode auto --policy scaler.yaml     does it
  trireme scaler run --record scaler.jsonl                keeps what it sees for trireme scaler replay
  trireme scaler run --processes kubernetes --target D=deployments/llm-decoder --target P=deployments/llm-prefill`
}

// Run runs the scaler until the process is told to end.
func (c *scalerRunCmd) Run(e *env) error {
	if err := checkAddress("--metrics", c.Metrics); err != nil {
		return err
	}
	return scaler.Run(e.ctx, scaler.Config{
		NATSURL: c.NATSURL, AckWait: c.AckWait, Replicas: c.Replicas, Mode: autoscale.Mode(c.Mode), Policy: c.Policy, Record: c.Record,
		RecordSize: int64(c.RecordSize), Metrics: c.Metrics, Lease: c.Lease, Settle: c.Settle,
		Anywhere: act.Processes(c.Processes).Anywhere(),
		Actuator: func(b *bus.Bus, log *slog.Logger) (act.Actuator, error) {
			return act.New(e.ctx, act.Config{
				Bus: b, Processes: act.Processes(c.Processes), Rate: int64(c.Rate), Timeout: c.Timeout, Log: log,
				Cluster: act.Cluster{Namespace: c.Namespace, Targets: c.Target},
			})
		},
	}, e.log)
}

// scalerStatusCmd shows what the scaler thinks.
type scalerStatusCmd struct {
	NATSURL string `name:"nats-url" help:"NATS server of the system." default:"nats://127.0.0.1:4222"`
	JSON    bool   `name:"json" help:"Write a list of JSON objects."`
	ackFlag
}

// Help is shown by `trireme scaler status --help`.
func (scalerStatusCmd) Help() string {
	return `Examples:
  trireme scaler status
  trireme scaler status --json | jq '.[] | select(.leads) | .decision.why'`
}

// Run asks and prints.
func (c *scalerStatusCmd) Run(e *env) error {
	ctx, cancel := context.WithTimeout(e.ctx, 5*time.Second)
	defer cancel()
	b, err := look(ctx, c.NATSURL, "scaler-status", c.ackFlag)
	if err != nil {
		return err
	}
	defer b.Close()
	all, err := scalers(ctx, b)
	if err != nil {
		return err
	}
	if c.JSON {
		return writeJSON(e.out, all)
	}
	if len(all) == 0 {
		return errors.New("no scaler answers: start one with `trireme scaler run`, or `trireme up --scaler auto`")
	}
	for i := range all {
		if i > 0 {
			fmt.Fprintln(e.out)
		}
		if err := all[i].Write(e.out); err != nil {
			return err
		}
	}
	return nil
}

// scalers asks every scaler; those that answer within a short while of the first count. Those that lead come first.
func scalers(ctx context.Context, b *bus.Bus) ([]explain.Status, error) {
	all := []explain.Status{}
	brief, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	err := b.AskAll(brief, wire.SubjectScaler, struct{}{}, func(data []byte) bool {
		var s explain.Status
		if json.Unmarshal(data, &s) == nil && s.Scaler != "" {
			all = append(all, s)
		}
		if len(data) > 0 {
			time.AfterFunc(100*time.Millisecond, cancel)
		}
		return len(data) > 0 // nobody listens
	})
	if err == nil && ctx.Err() != nil {
		err = fmt.Errorf("asking scalers: %w", context.Cause(ctx))
	}
	slices.SortFunc(all, func(a, b explain.Status) int {
		if a.Leads != b.Leads {
			return map[bool]int{true: -1, false: 1}[a.Leads]
		}
		return strings.Compare(a.Scaler, b.Scaler)
	})
	return all, err
}

// scalerReplayCmd decides anew.
type scalerReplayCmd struct {
	File   string `arg:"" help:"Record that a scaler has written (trireme scaler run --record)." type:"path"`
	Policy string `help:"Decide by this policy file, in its mode, instead of the policies of the record." env:"-" type:"path" placeholder:"FILE"`
	All    bool   `help:"Print also what changes nothing." env:"-"`
	JSON   bool   `name:"json" help:"Write each decision as one JSON object a line."`
}

// Help is shown by `trireme scaler replay --help`.
func (scalerReplayCmd) Help() string {
	return `What the scaler saw second for second is decided by again. The same policy makes the same decisions, byte for byte: those that differ are
counted, and without --policy are an error, unless the record is the second half of a longer one. With --policy the decisions are those that
that policy would have made of what was seen; the fleet of the record does not follow them.

Examples:
  trireme scaler replay scaler.jsonl
  trireme scaler replay scaler.jsonl --policy other.yaml
  trireme scaler replay scaler.jsonl --json | jq -r '.change.action' | sort | uniq -c`
}

// Run decides and prints.
func (c *scalerReplayCmd) Run(e *env) error {
	f, err := os.Open(c.File)
	if err != nil {
		return fmt.Errorf("%wopening the record: %w", errUsage, err)
	}
	defer f.Close()
	var p *autoscale.Policy
	if c.Policy != "" {
		if p, err = readPolicy(c.Policy); err != nil {
			return err
		}
	}
	r := replayed{cmd: c, out: e.out}
	step := func(s *record.Step) error {
		if e.ctx.Err() != nil {
			return context.Cause(e.ctx)
		}
		return r.step(s)
	}
	if err := record.Replay(f, p, step); err != nil {
		return fmt.Errorf("%s: %w", c.File, err)
	}
	fmt.Fprintf(e.err, "%d decisions, %d of them changes; in the record %d; %d are not as recorded\n", r.decisions, r.changes, r.recorded, r.others)
	if r.others > 0 && p == nil && !r.continues {
		return errors.New("the same policy has decided otherwise: the record is of another version of Trireme, or not as it was written")
	}
	return nil
}

// replayed counts what a replay brings.
type replayed struct {
	cmd                                  *scalerReplayCmd
	out                                  io.Writer
	decisions, changes, recorded, others int
	continues                            bool
}

func (r *replayed) step(s *record.Step) error {
	if s.Began != nil {
		r.continues = r.continues || s.Began.Continues
		if !r.cmd.JSON {
			fmt.Fprintf(r.out, "record of %s, from %s on\n", s.Began.Scaler, s.Began.Time.Local().Format("2006-01-02 15:04:05"))
		}
	}
	r.decisions++
	change := s.Decision.Change.Action != autoscale.None
	if change {
		r.changes++
	}
	var recorded autoscale.Decision
	if json.Unmarshal(s.Recorded, &recorded) == nil && recorded.Change.Action != autoscale.None {
		r.recorded++
	}
	same := s.Same()
	if !same {
		r.others++
	}
	if !change && !r.cmd.All {
		return nil
	}
	if r.cmd.JSON {
		_, err := fmt.Fprintf(r.out, "%s\n", s.Text)
		return err
	}
	note := ""
	if !same {
		note = "  (not as recorded)"
	}
	_, err := fmt.Fprintf(r.out, "%10s  %s%s\n", s.Decision.Now.Round(time.Second), s.Decision.Why, note)
	return err
}

// readPolicy reads a policy file.
func readPolicy(file string) (*autoscale.Policy, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("%wreading the policy: %w", errUsage, err)
	}
	p, err := autoscale.Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return &p, nil
}
