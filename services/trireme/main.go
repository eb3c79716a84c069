// Command trireme is the one binary of Trireme: `trireme up` runs everything on this machine, a subcommand runs each
// service alone, and others are for operators.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"

	"github.com/alecthomas/kong"

	"trireme.dev/services/hmm"
	"trireme.dev/services/scaler/explain"
	"trireme.dev/services/scaler/record"
	"trireme.dev/services/trireme/benchcmd"
	"trireme.dev/services/trireme/modelcmd"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/obs"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// Exit statuses.
const (
	exitFailed = 1   // something went wrong while running
	exitUsage  = 2   // the command line, configuration or model folder cannot be used: trying again will not help
	exitSignal = 128 // and a signal's number: it ended the command before that was done
)

// cli is the whole command line.
type cli struct {
	Config     kong.ConfigFlag `help:"YAML file of settings; flags and environment stand above it." placeholder:"FILE"`
	LogFormat  string          `help:"text or json." default:"text" enum:"text,json"`
	LogLevel   string          `help:"debug, info, warn or error; by default info, of up and its children warn."`
	CPUProfile string          `name:"cpu-profile" help:"Write a CPU profile of this process to a file when it ends, for go tool pprof." placeholder:"FILE" type:"path" hidden:""`

	Up        upCmd         `cmd:"" help:"Run everything on this machine: NATS, HMM, stages and gateway." group:"Run"`
	Chat      chatCmd       `cmd:"" help:"Ask a running gateway, with pictures if you like; the answer streams." group:"Use"`
	Status    statusCmd     `cmd:"" help:"Show stages, NPUs, queues and memory." group:"Use"`
	Events    eventsCmd     `cmd:"" help:"Show what has happened: instances that came, went or died, and what was done about it." group:"Use"`
	Dead      deadCmd       `cmd:"" help:"List, show, replay or delete requests that failed for good." group:"Use"`
	Scale     scaleCmd      `cmd:"" help:"Give a running instance another number of NPUs." group:"Use"`
	Role      roleCmd       `cmd:"" help:"Have an NPU go over to an instance of another role." group:"Use"`
	Rebalance rebalanceCmd  `cmd:"" help:"Place the experts of a running instance anew, by their measured load." group:"Use"`
	Explain   explainCmd    `cmd:"" help:"Say why the scaler has decided something, and what came of it." group:"Use"`
	Plan      benchcmd.Plan `cmd:"" help:"Find the topology that serves a load best, by simulation." group:"Use"`
	Model     modelCmd      `cmd:"" help:"Check a model folder or its tokenizer." group:"Use"`
	Bench     benchCmd      `cmd:"" help:"Measure: what memory costs here, what clients of a server feel." group:"Use"`

	Gateway gatewayCmd `cmd:"" help:"Run the gateway: OpenAI-compatible HTTP." group:"Services"`
	Encoder encoderCmd `cmd:"" help:"Run an encoder: pixels to multimodal tokens." group:"Services"`
	Prefill prefillCmd `cmd:"" help:"Run a prefill instance: prompt to KV and the first token." group:"Services"`
	Decoder decoderCmd `cmd:"" help:"Run a decoder: KV to tokens." group:"Services"`
	Stage   stageCmd   `cmd:"" help:"Run an instance with several of these roles on one NPU." group:"Services"`
	Hmm     hmmCmd     `cmd:"" help:"Run the HBM daemon of a node, which owns its device memory." group:"Services"`

	Scaler scalerCmd `cmd:"" help:"Run what decides about NPUs by itself, or look into it: run, status, check, replay." group:"Services"`

	Healthcheck healthcheckCmd `cmd:"" help:"Exit with 0 if a URL answers 200: for containers, which have no curl." group:"Use"`
	Version     versionCmd     `cmd:"" help:"Print the version." group:"Use"`
}

type modelCmd struct {
	Verify   modelcmd.Verify   `cmd:"" help:"Run reference cases through the engine and compare."`
	Tokenize modelcmd.Tokenize `cmd:"" help:"Token ids of JSON strings, one a line."`
}

type benchCmd struct {
	Memory    benchcmd.Memory    `cmd:"" help:"Mapping, copies, calls of the HMM, checksums, as a table of ratios."`
	Serve     benchcmd.Serve     `cmd:"" help:"Send a load to any OpenAI-compatible server; report as vllm bench serve does."`
	Control   benchcmd.Control   `cmd:"" help:"What everything around the models costs: hops, messages, many streams at once."`
	IRP       benchcmd.IRP       `cmd:"" name:"irp" help:"What it brings that a request's pictures are encoded in parallel, on paced NPUs."`
	Compare   benchcmd.Compare   `cmd:"" help:"The same loads on topologies of equal NPU count, paced, and when separate encoding pays."`
	Scale     benchcmd.Scale     `cmd:"" help:"What it costs to change the NPUs of a running instance, in several ways."`
	Autoscale benchcmd.Autoscale `cmd:"" help:"Loads that change, simulated: the scaler, static topologies and the rules of others."`
	Give      benchcmd.Give      `cmd:"" hidden:""`
	NATS      benchcmd.NATS      `cmd:"" name:"nats" hidden:""`
	StandIn   benchcmd.StandIn   `cmd:"" hidden:""`
}

type versionCmd struct{}

// Run prints the version.
func (versionCmd) Run(e *env) error {
	_, err := fmt.Fprintln(e.out, "trireme", obs.Version())
	return err
}

// env is what commands run in.
type env struct {
	ctx      context.Context
	in       io.Reader
	out, err io.Writer
	log      *slog.Logger
	inherit  []string // flags for children: they log alike and read the same file of settings
	settings string   // that file; "": none
}

const description = `Trireme serves vision-language mixture-of-experts models with encode, prefill and decode as separate
services.

Examples:
  trireme up                                        everything, with the bundled model
  trireme up --topology 2E1P2D --model ./my-model   more instances, another model
  trireme chat --image photo.png "What is this?"    ask it
  trireme status                                    look inside

Every flag can also be set in the environment (TRIREME_HTTP for --http) or in a file given with --config, where a
command's flags stand under its name:
  log-level: info
  up:
    topology: 2E1P2D
    npu-memory: 8GiB`

// run is main without the process: it returns the exit status.
func run(args []string, in io.Reader, out, errOut io.Writer) (status int) {
	var c cli
	exited := -1
	parser := newParser(&c, args, out, errOut, func(code int) { exited = code; panic(exitNow{}) })
	defer func() { // --help and --version leave the parser this way
		if p := recover(); p != nil {
			if _, ok := p.(exitNow); !ok {
				panic(p)
			}
			status = exited
			if len(args) == 0 {
				status = exitUsage
			}
		}
	}()
	if len(args) == 0 { // what there is to say is more than which commands there are
		parser.Stdout = errOut
		_, _ = parser.Parse([]string{"--help"}) // leaves by a panic
	}
	k, err := parser.Parse(shielded(glued(args, valued(parser.Model.Node))))
	if err != nil {
		fmt.Fprintf(errOut, "trireme: %v%s\n", err, hint(err))
		return exitUsage
	}
	if c.LogLevel == "" {
		c.LogLevel = "info"
		if k.Command() == "up" {
			c.LogLevel = "warn"
		}
	}
	log, err := obs.Logger(errOut, c.LogFormat, c.LogLevel)
	if err != nil {
		fmt.Fprintf(errOut, "trireme: %v\n", err)
		return exitUsage
	}
	ctx, stop := interruptible()
	defer stop()
	inherit := []string{"--log-level", c.LogLevel, "--log-format", c.LogFormat}
	if c.Config != "" {
		inherit = append(inherit, "--config", string(c.Config))
	}
	if c.CPUProfile != "" {
		done, err := cpuProfile(c.CPUProfile)
		if err != nil {
			fmt.Fprintf(errOut, "trireme: %v\n", err)
			return exitUsage
		}
		defer done()
	}
	err = k.Run(&env{ctx: ctx, in: in, out: out, err: errOut, log: log, inherit: inherit, settings: string(c.Config)},
		log, modelcmd.Streams{In: in, Out: out, Err: errOut}, benchcmd.Env{Context: ctx, In: in, Out: out, Err: errOut})
	return report(errOut, k.Command(), err, context.Cause(ctx), serves(k.Selected()))
}

// newParser makes the parser of a command line into c; exit is called after --help.
func newParser(c *cli, args []string, out, errOut io.Writer, exit func(int)) *kong.Kong {
	parser, err := kong.New(c,
		kong.IgnoreFields(unneeded(args, os.Getenv("TRIREME_CONFIG"))...),
		kong.Name("trireme"),
		kong.Description(description),
		kong.Writers(out, errOut),
		kong.Exit(exit),
		kong.Configuration(conf.YAML),
		kong.DefaultEnvars("TRIREME"),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, NoExpandSubcommands: true}),
		kong.Vars{
			"data": defaultData(), "lease": stage.DefaultLease.String(), "offerWait": stage.DefaultOfferWait.String(), "drain": stage.DefaultDrain.String(), "reserve": hmm.DefaultReserve.String(), "profiles": strings.Join(pace.Names(), ", "),
			"spare": fmt.Sprint(wire.DefaultSpare), "slack": fmt.Sprint(wire.DefaultSlack),
			"stepTokens": strconv.Itoa(stage.MixedDefault.Tokens), "stepBlocks": strconv.Itoa(stage.MixedDefault.Blocks),
		},
	)
	if err != nil {
		panic("BUG: command line: " + err.Error())
	}
	return parser
}

// hint says where more is said of a command line that cannot be read.
func hint(err error) string {
	var p *kong.ParseError
	if !errors.As(err, &p) || p.Context == nil {
		return ""
	}
	command := "trireme"
	if n := p.Context.Selected(); n != nil {
		command = n.FullPath()
	} else if len(p.Context.Path) > 0 {
		command = p.Context.Path[len(p.Context.Path)-1].Node().FullPath()
	}
	return fmt.Sprintf(" (%s --help tells more)", command)
}

// unneeded are the commands, as kong.IgnoreFields takes them, that a command line does not mean as it begins with another one: to describe them
// all to the parser would take half of the time in which a short command is done. A file of settings may name flags of each.
func unneeded(args []string, config string) (patterns []string) {
	if len(args) == 0 || config != "" || slices.ContainsFunc(args, func(a string) bool { return strings.HasPrefix(a, "--config") }) {
		return nil
	}
	known := false
	for f := range reflect.TypeFor[cli]().Fields() {
		if _, command := f.Tag.Lookup("cmd"); !command {
			continue
		}
		if args[0] == strings.ToLower(f.Name) {
			known = true
		} else {
			patterns = append(patterns, `^cli\.`+f.Name+`$`)
		}
	}
	if !known {
		return nil
	}
	return patterns
}

// cpuProfile writes a CPU profile from now until done is called.
func cpuProfile(file string) (done func(), err error) {
	f, err := os.Create(file)
	if err != nil {
		return nil, fmt.Errorf("--cpu-profile: %w", err)
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, errors.Join(fmt.Errorf("--cpu-profile: %w", err), f.Close())
	}
	return func() {
		pprof.StopCPUProfile()
		_ = f.Close() // a profile that could not be written is seen when it is read
	}, nil
}

type exitNow struct{}

// report prints an error as one line and says which exit status it is. cause is why the command's context has ended, if it has. A service runs
// until a signal ends it; what another command was to do is not done then, and its status is 128 and the signal's number, as shells have it.
func report(w io.Writer, command string, err, cause error, service bool) int {
	if err == nil || service && errors.Is(err, context.Canceled) {
		return 0
	}
	var i interrupted
	if errors.Is(err, context.Canceled) && errors.As(cause, &i) {
		return exitSignal + int(i)
	}
	command, _, _ = strings.Cut(command, " <")
	fmt.Fprintf(w, "trireme %s: %v\n", command, err)
	for _, e := range []error{
		errUsage, benchcmd.ErrUsage, bus.ErrNoInstance, explain.ErrUnknown, record.ErrRecord, conf.ErrNPUs, hf.ErrUnsupported, hf.ErrConfig, hf.ErrDamaged, hf.ErrMissing, hf.ErrDType, conf.ErrTopology,
		pace.ErrProfile, autoscale.ErrPolicy,
	} {
		if errors.Is(err, e) {
			return exitUsage
		}
	}
	return exitFailed
}

// errUsage marks errors that trying again will not mend.
var errUsage = errors.New("")

// defaultData is where state is kept: XDG_DATA_HOME/trireme, by default ~/.local/share/trireme.
func defaultData() string {
	if dir := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "trireme")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return filepath.Join(os.TempDir(), "trireme")
	}
	return filepath.Join(home, ".local", "share", "trireme")
}
