package benchcmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"trireme.dev/models"
	"trireme.dev/services/trireme/standin"
	"trireme.dev/shared/stage"
)

// Control is `trireme bench control`.
type Control struct {
	Streams  int           `help:"Open streams of the load." default:"1000"`
	Step     time.Duration `help:"Time between two tokens of a stream." default:"50ms"`
	Decoders int           `help:"Decode stand-ins; each takes 256 streams at most and sends one message a step." default:"4"`
	Together bool          `help:"All decoders take their steps at the same moments, the worst case; else they are spread evenly."`
	Time     time.Duration `help:"How long all streams are measured together." default:"10s"`
	Requests int           `help:"Requests one after the other, for what a hop adds and what a request sends." default:"200"`
	JSON     bool          `name:"json" help:"Write one JSON object instead of a table."`
	Profile  string        `help:"Write the gateway's CPU profile of the whole run to a file, for go tool pprof." placeholder:"FILE" type:"path"`
}

// Help is shown by ` + "`trireme bench control --help`" + `.
func (Control) Help() string {
	return `Runs a real NATS, HMM and gateway, and stages that are stand-ins: they take messages, claim, answer and settle as the real
ones do, but compute nothing and answer at once. What is left is what everything around the models costs: the time that each
hop adds, messages and bytes of a request, and how late tokens are with many streams open. The load client is this process, on
the same cores; its processor time is told beside the others'.

Examples:
  trireme bench control
  trireme bench control --streams 200 --time 3s        quick
  trireme bench control --json | jq .load`
}

// Run measures and prints.
func (c *Control) Run(e Env) error {
	if c.Streams < 1 || c.Streams > 256*c.Decoders || c.Decoders > 32 || c.Step < time.Millisecond || c.Step > time.Second ||
		c.Time < c.Step || c.Time > 2*time.Minute || c.Requests < 1 || c.Requests > 1e5 {
		return fmt.Errorf("--streams 1 to 256 a decoder, --decoders up to 32, --step 1ms to 1s, --time up to 2m, --requests up to 100000%w", ErrUsage)
	}
	var s *system
	r := &ControlReport{Streams: c.Streams, Step: c.Step.Seconds() * 1e3, Decoders: c.Decoders, Together: c.Together}
	err := onThread(func() (err error) {
		s, err = c.start(e)
		return err
	}, func() (err error) {
		defer func() { err = errors.Join(err, s.close()) }()
		if err := s.measure(e, c, r); err != nil {
			return s.because(err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return write(e.Out, c.JSON, r)
}

// system is a NATS, an HMM, a gateway and stand-ins.
type system struct {
	*crew
	url     string // of the gateway
	monitor string // of NATS
	procs   []proc
	stages  []*stander
}

// proc is a process and what its processor time is booked to.
type proc struct {
	name string
	pid  int
}

// stander is a stand-in and the pipe over which it hands its notes over.
type stander struct {
	role  string
	ask   io.WriteCloser
	notes *json.Decoder
}

// start starts the processes and waits until a request would succeed.
func (c *Control) start(e Env) (_ *system, err error) {
	s := new(system)
	if s.crew, err = newCrew(e.Context); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	model, err := models.Unpack(s.dir)
	if err != nil {
		return nil, err
	}
	url, err := s.startNATS()
	if err != nil {
		return nil, s.because(err)
	}
	socket := filepath.Join(s.dir, "hmm.sock")
	npus := c.Decoders + 2
	if err := s.run("hmm", "hmm", "--nats-url", url, "--socket", socket, "--npus", strconv.Itoa(npus), "--npu-memory=8GiB",
		"--host-memory=256MiB", "--log-level=warn"); err != nil {
		return nil, err
	}
	common := []string{"--nats-url", url, "--hmm", socket, "--model", model, "--data", s.dir, "--log-level=warn"}
	for role, slots := range map[string]int{stage.Encode: 8, stage.Prefill: 64} {
		if err := s.stand(role, append(common, "--slots", strconv.Itoa(slots))); err != nil {
			return nil, err
		}
	}
	for i := range c.Decoders {
		var phase time.Duration
		if !c.Together {
			phase = c.Step * time.Duration(i) / time.Duration(c.Decoders)
		}
		if err := s.stand(stage.Decode, append(common, "--slots=256", "--step", c.Step.String(), "--phase", phase.String())); err != nil {
			return nil, err
		}
	}
	at, err := freeAddress()
	if err != nil {
		return nil, err
	}
	s.url = "http://" + at
	args := append([]string{"gateway", "--http", at, "--max-open", strconv.Itoa(c.Streams + 100), "--served-name", models.Default}, common...)
	if c.Profile != "" {
		args = append(args, "--cpu-profile", c.Profile)
	}
	if err := s.run("gateway", args...); err != nil {
		return nil, err
	}
	return s, s.healthy(s.url)
}

// freeAddress is a local address that nobody listens on: not one of the ports from 32768 on, which the system gives to anybody who asks for
// any, and may before it is used.
func freeAddress() (string, error) {
	var err error
	for range 100 {
		var l net.Listener
		if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 10_000+rand.IntN(10_000))); err == nil {
			return l.Addr().String(), l.Close()
		}
	}
	return "", fmt.Errorf("looking for a free port: %w", err)
}

// run starts a process whose processor time is booked to name.
func (s *system) run(name string, args ...string) error {
	cmd, err := s.crew.start(name, nil, nil, nil, args...)
	if err != nil {
		return err
	}
	s.procs = append(s.procs, proc{name, cmd.Process.Pid})
	return nil
}

// startNATS starts the NATS server and returns its URL.
func (s *system) startNATS() (string, error) {
	at, cmd, err := s.crew.startNATS()
	if err != nil {
		return "", err
	}
	s.procs = append(s.procs, proc{"nats", cmd.Process.Pid})
	s.monitor = at.Monitor
	return at.URL, nil
}

// stand starts a stand-in.
func (s *system) stand(role string, args []string) error {
	in, ask, err := os.Pipe()
	if err != nil {
		return err
	}
	defer in.Close()
	notes, out, err := os.Pipe()
	if err != nil {
		return err
	}
	defer out.Close()
	var cmd *exec.Cmd
	if cmd, err = s.crew.start("the "+role+" stand-in", in, out, nil, append([]string{"bench", "stand-in", "--role", role}, args...)...); err != nil {
		return err
	}
	context.AfterFunc(s.ctx, func() { _ = notes.Close() }) // who waits for it waits no longer
	s.procs = append(s.procs, proc{"stages (stand-ins)", cmd.Process.Pid})
	s.stages = append(s.stages, &stander{role: role, ask: ask, notes: json.NewDecoder(notes)})
	return nil
}

// notes collects what the stand-ins of each role have noted since the last time.
func (s *system) notes() (map[string][]standin.Diary, error) {
	all := make(map[string][]standin.Diary)
	for _, st := range s.stages {
		if _, err := st.ask.Write([]byte("\n")); err != nil {
			return nil, fmt.Errorf("asking the %s stand-in for its notes: %w", st.role, err)
		}
		var d standin.Diary
		if err := st.notes.Decode(&d); err != nil {
			return nil, fmt.Errorf("reading the notes of the %s stand-in: %w", st.role, err)
		}
		all[st.role] = append(all[st.role], d)
	}
	return all, nil
}

// StandIn is the hidden `trireme bench stand-in`: a stage for Control that computes nothing.
type StandIn struct {
	NATSURL string        `name:"nats-url" required:""`
	HMM     string        `name:"hmm" required:"" type:"path"`
	Model   string        `required:"" type:"path"`
	Data    string        `type:"path"`
	Role    string        `required:"" enum:"encode,prefill,decode"`
	Slots   int           `default:"64"`
	Step    time.Duration `default:"0"`
	Phase   time.Duration `default:"0"`
}

// Run serves the role.
func (c *StandIn) Run(e Env, log *slog.Logger) error {
	cfg := standin.Config{Role: c.Role, Step: c.Step, Phase: c.Phase, Slots: c.Slots}
	return standin.Run(e.Context, cfg, e.In, e.Out, func() (*stage.Stage, error) {
		return stage.Open(e.Context, c.Role, stage.Config{
			NATSURL: c.NATSURL, HMM: c.HMM, Model: c.Model, Instance: stage.NewID("standin", c.Role),
		}, log)
	})
}
