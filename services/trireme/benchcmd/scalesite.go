package benchcmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
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

// madeUp is the folder of the model of Scale.
type madeUp struct {
	dir       string
	temporary string // what is removed in the end; "": nothing
}

// modelName is what clients call it.
const modelName = "made-up"

// shapeOf is a model with experts of so many bytes together, or a few more. Paced NPUs compute all the same, and a token's experts are the
// larger part of that: there are many of them, of 1.1 MiB if they are not to be more than a thousand, and a token goes to one in each layer, in
// order that a few cores can keep up with a profile while gigabytes have to be moved. They are whole pages: padding is not what is measured.
func shapeOf(bytes int64, vocab int) hftest.Shape {
	const layers, hidden, most, whole = 4, 256, 1024, 128 // so many rows of each of its matrices are pages
	s := hftest.Shape{Layers: layers, Hidden: hidden, ExpertHidden: 6 * whole, TopK: 1, Vocab: vocab, Seed: 1}
	experts := func() int64 { return (bytes + layers*s.ExpertBytes() - 1) / (layers * s.ExpertBytes()) }
	for experts() > most {
		s.ExpertHidden += whole
	}
	s.Experts = int(max(16, experts()))
	return s
}

// newModel makes a model with experts of so many bytes together, which speaks the bundled model's tokens, in a folder below keep, unless it is
// there; "": in one that is removed.
func newModel(keep string, bytes int64) (_ *madeUp, err error) {
	m := &madeUp{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("making a model of %v: %w", conf.Bytes(bytes), err), m.remove())
		}
	}()
	if keep != "" {
		if err := os.MkdirAll(keep, 0o755); err != nil {
			return nil, err
		}
	}
	if m.temporary, err = os.MkdirTemp(keep, "trireme-model-"); err != nil {
		return nil, err
	}
	bundled, err := models.Unpack(m.temporary)
	if err != nil {
		return nil, err
	}
	f, err := hf.Open(bundled)
	if err != nil {
		return nil, err
	}
	s := shapeOf(bytes, f.Config.Text.Vocab)
	f.Close()
	kept := filepath.Join(keep, fmt.Sprintf("%s-%dx%d-%dx%d", modelName, s.Layers, s.Experts, s.Hidden, s.ExpertHidden))
	if _, err := os.Stat(kept); keep != "" && err == nil {
		m.dir = kept
		return m, m.remove()
	}
	m.dir = filepath.Join(m.temporary, modelName)
	if err := hftest.Write(m.dir, s); err != nil {
		return nil, err
	}
	for _, name := range []string{"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} {
		data, err := os.ReadFile(filepath.Join(bundled, name))
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(m.dir, name), data, 0o644); err != nil {
			return nil, err
		}
	}
	if keep == "" {
		return m, nil
	}
	if err := os.Rename(m.dir, kept); err != nil { // at once: what is there is whole
		return nil, err
	}
	m.dir = kept
	return m, m.remove()
}

// remove removes what is not to be kept.
func (m *madeUp) remove() error {
	if m.temporary == "" {
		return nil
	}
	dir := m.temporary
	m.temporary = ""
	return os.RemoveAll(dir)
}

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

// nodeName is the node's.
const nodeName = "bench"

// prefillNPUs are those of the instance, in a change of roles, that gives or gets one.
const prefillNPUs = 2

// onSite starts a system with an instance of --from NPUs, and room for a change in a way, has do use it, and ends it.
func onSite(e Env, c *Scale, w way, rate conf.Bytes, model string, do func(*site) error) error {
	s := &site{scale: c, way: w, rate: rate, name: "first", model: model}
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
	roles := "PD"
	if c.Change == wire.ChangeRole {
		npus, roles = c.From+prefillNPUs, "D"
	}
	if _, err := s.start("the HMM", nil, nil, nil, "hmm", "--nats-url", s.nats, "--node", nodeName, "--socket", s.hmm, "--npus", strconv.Itoa(npus),
		"--npu-memory", memory.String(), "--host-memory=256MiB", "--domains", c.Domains,
		"--weights-memory", conf.Bytes(sets*(int64(c.Bytes)+int64(c.Bytes)/8+256<<20)).String(), "--log-level=warn"); err != nil {
		return err
	}
	flags := s.way.unlike
	if s.way.disk {
		flags = append(slices.Clone(flags), "--disk-rate", c.DiskRate.String())
	}
	if s.instance, err = s.begin(s.name, roles, c.From, flags...); err != nil {
		return err
	}
	others := map[string]int{}
	switch {
	case c.Change == wire.ChangeRole:
		others["prefill"] = prefillNPUs
		_, err = s.begin("prefill", "P", prefillNPUs)
	case s.way.standby:
		others["second"] = 0
		_, err = s.begin("second", roles, 0)
	}
	if err != nil {
		return err
	}
	others[s.name] = c.From
	for name, npus := range others {
		if err := s.ready(s.ctx, name, npus); err != nil {
			return err
		}
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
func (s *site) begin(name, roles string, npus int, flags ...string) (*exec.Cmd, error) {
	args := []string{"stage", "--roles", roles, "--name", name, "--npus", strconv.Itoa(npus), "--threads", strconv.Itoa(max(1, npus)),
		"--nats-url", s.nats, "--hmm", s.hmm, "--model", s.model, "--data", s.dir, "--log-level=warn"}
	if p := s.scale.Pace; p != "" {
		args = append(args, "--pace", p)
	}
	return s.start("instance "+name, nil, nil, nil, append(args, flags...)...)
}

// ready waits until an instance serves on so many NPUs.
func (s *site) ready(ctx context.Context, name string, npus int) error {
	_, err := s.find(ctx, name, npus)
	return err
}

// find does so, and returns what it says of itself.
func (s *site) find(ctx context.Context, name string, npus int) (wire.Instance, error) {
	view, err := s.bus.Instances(ctx)
	if err != nil {
		return wire.Instance{}, err
	}
	for {
		for _, i := range view.All() {
			if i.Name == name && i.Ready && len(i.NPUs) == npus {
				return i, nil
			}
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return wire.Instance{}, fmt.Errorf("waiting for %s to serve on %d NPUs: %w", name, npus, context.Cause(ctx))
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
