package benchcmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"trireme.dev/models"
	"trireme.dev/services/trireme/scaling"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/hf/hftest"
	"trireme.dev/shared/wire"
)

// madeUp is a folder with the model of Scale.
type madeUp struct{ dir string }

// modelName is what clients call it.
const modelName = "made-up"

// newModel makes a model with experts of so many bytes together, of which a token goes to one in each layer, so that a few cores can
// compute it. It speaks the bundled model's tokens.
func newModel(bytes int64) (_ *madeUp, err error) {
	m := &madeUp{}
	if m.dir, err = os.MkdirTemp("", "trireme-model-"); err != nil {
		return nil, fmt.Errorf("a folder for the model: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("making a model of %v: %w", conf.Bytes(bytes), err), m.remove())
		}
	}()
	bundled, err := models.Unpack(m.dir)
	if err != nil {
		return nil, err
	}
	f, err := hf.Open(bundled)
	if err != nil {
		return nil, err
	}
	vocab := f.Config.Text.Vocab
	f.Close()
	s := hftest.Shape{Layers: 8, Experts: 64, Hidden: 256, TopK: 1, Vocab: vocab, Seed: 1}
	s.ExpertHidden = int(math.Ceil(float64(bytes)/float64(s.Layers*s.Experts*6*s.Hidden)/8)) * 8
	dir := filepath.Join(m.dir, modelName)
	if err := hftest.Write(dir, s); err != nil {
		return nil, err
	}
	for _, name := range []string{"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} {
		data, err := os.ReadFile(filepath.Join(bundled, name))
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *madeUp) remove() error { return os.RemoveAll(m.dir) }

// site is a system with one instance that computes prompts and decodes: NATS, an HMM, a gateway.
type site struct {
	*crew
	scale *Scale
	way   way
	rate  conf.Bytes // of copies
	model string
	url   string // of the gateway
	nats  string
	hmm   string // socket
	bus   *bus.Bus

	instance *exec.Cmd
	name     string
}

// onSite starts a system with an instance of --from NPUs, and room for a change in a way, has do use it, and ends it.
func onSite(e Env, c *Scale, w way, rate conf.Bytes, model string, do func(*site) error) error {
	s := &site{scale: c, way: w, rate: rate, name: "first", model: filepath.Join(model, modelName)}
	return onThread(func() (err error) {
		if s.crew, err = newCrew(e.Context); err != nil {
			return err
		}
		if err = s.open(); err != nil {
			err = errors.Join(s.because(err), s.close())
		}
		return err
	}, func() (err error) {
		defer func() { err = errors.Join(err, s.close()) }()
		if err := do(s); err != nil {
			return s.because(err)
		}
		return nil
	})
}

func (s *site) close() error {
	if s.bus != nil {
		s.bus.Close()
	}
	return s.crew.close()
}

func (s *site) open() error {
	at, _, err := s.startNATS()
	if err != nil {
		return err
	}
	s.nats, s.hmm = at.URL, filepath.Join(s.dir, "hmm.sock")
	if s.bus, err = bus.Connect(s.ctx, s.nats, "bench", slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	c := s.scale
	memory := npuMemory
	if s.way.shares {
		memory /= 2
	}
	sets := int64(1) // of weights in a domain at a time
	if c.Domains == "node" {
		sets = 2
	}
	npus := max(c.From, c.To)
	if s.way.apart {
		npus = c.From + c.To
	}
	if _, err := s.start("the HMM", nil, nil, nil, "hmm", "--nats-url", s.nats, "--socket", s.hmm, "--npus", strconv.Itoa(npus),
		"--npu-memory", memory.String(), "--host-memory=256MiB", "--domains", c.Domains,
		"--weights-memory", conf.Bytes(sets*(int64(c.Bytes)+int64(c.Bytes)/8+256<<20)).String(), "--log-level=warn"); err != nil {
		return err
	}
	flags := s.way.unlike
	if s.way.disk {
		flags = append(slices.Clone(flags), "--disk-rate", c.DiskRate.String())
	}
	if s.instance, err = s.begin(s.name, c.From, flags...); err != nil {
		return err
	}
	if err := s.ready(s.ctx, s.name, c.From); err != nil {
		return err
	}
	http, err := freeAddress()
	if err != nil {
		return err
	}
	s.url = "http://" + http
	if _, err := s.start("the gateway", nil, nil, nil, "gateway", "--http", http, "--served-name", modelName, "--max-open=4096", "--max-queue=4096",
		"--queue-wait", c.Longest.String(), "--nats-url", s.nats, "--hmm", s.hmm, "--model", s.model, "--data", s.dir, "--log-level=warn"); err != nil {
		return err
	}
	return s.healthy(s.url)
}

// npuMemory is an NPU's memory for sequences.
const npuMemory = conf.Bytes(256 << 20)

// begin starts an instance of so many NPUs.
func (s *site) begin(name string, npus int, flags ...string) (*exec.Cmd, error) {
	args := []string{"stage", "--roles=PD", "--name", name, "--npus", strconv.Itoa(npus), "--threads", strconv.Itoa(npus),
		"--nats-url", s.nats, "--hmm", s.hmm, "--model", s.model, "--data", s.dir, "--log-level=warn"}
	if p := s.scale.Pace; p != "" {
		args = append(args, "--pace", p)
	}
	return s.start("instance "+name, nil, nil, nil, append(args, flags...)...)
}

// ready waits until an instance serves on so many NPUs.
func (s *site) ready(ctx context.Context, name string, npus int) error {
	view, err := s.bus.Instances(ctx)
	if err != nil {
		return err
	}
	for {
		for _, i := range view.All() {
			if i.Name == name && i.Ready && len(i.NPUs) == npus {
				return nil
			}
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s to serve on %d NPUs: %w", name, npus, context.Cause(ctx))
		}
	}
}

// memoryEvery is the time between two looks at the HMM's books.
const memoryEvery = 20 * time.Millisecond

// watchMemory looks at what the NPUs have in use, until the function that it returns is called.
func (s *site) watchMemory() func() []scaling.Memory {
	var all []scaling.Memory
	var watching sync.WaitGroup
	ctx, stop := context.WithCancel(s.ctx)
	watching.Go(func() {
		for ctx.Err() == nil {
			if msg, err := s.bus.Conn().RequestWithContext(ctx, wire.SubjectHMM, nil); err == nil {
				var stats hbm.Stats
				if json.Unmarshal(msg.Data, &stats) == nil {
					all = append(all, scaling.Memory{At: time.Now(), Bytes: inUse(stats)})
				}
			}
			select {
			case <-time.After(memoryEvery):
			case <-ctx.Done():
			}
		}
	})
	return func() []scaling.Memory {
		stop()
		watching.Wait()
		return all
	}
}

// inUse is the memory of NPUs, weights included, that more than a cache keeps.
func inUse(s hbm.Stats) (sum int64) {
	for _, m := range append(s.Memory[1:], s.Shared...) { // the first is the host's own
		sum += m.Used + m.Padded - m.Cached
	}
	return sum
}
