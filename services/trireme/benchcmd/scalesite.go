package benchcmd

import (
	"context"
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
	"trireme.dev/shared/bus"
	"trireme.dev/shared/conf"
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
	ready int64 // bytes of memory that each NPU has before the change

	members []member // the instances that serve, but for one that stands by
}

// member is an instance of a site.
type member struct {
	name, roles string
	npus        int
	cmd         *exec.Cmd // nil: not started
}

// nodeName is the node's.
const nodeName = "bench"

// The names of a site's instances. In a change of roles there is one that computes prompts, which gives or gets an NPU.
const (
	firstName   = "first"
	secondName  = "second"
	prefillName = "prefill"
)

// prefillNPUs are those of the instance of that name before.
const prefillNPUs = 2

// members are the instances of a change in which the first one has so many NPUs, not started.
func (c *Scale) members(npus int) []member {
	if c.Change != wire.ChangeRole {
		return []member{{name: firstName, roles: "PD", npus: npus}}
	}
	return []member{{name: firstName, roles: "D", npus: npus}, {name: prefillName, roles: "P", npus: prefillNPUs + c.From - npus}}
}

// onSite starts a system with an instance of --from NPUs, and room for a change in a way, has do use it, and ends it.
func onSite(e Env, c *Scale, w way, rate conf.Bytes, model string, do func(*site) error) error {
	s := &site{scale: c, way: w, rate: rate, model: model}
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
	before, after := c.members(c.From), c.members(c.To)
	sets := int64(1) // of weights in a domain at a time
	if c.Domains == "node" {
		sets = 1 + int64(len(after)) // the one of those before, and each of the others its own
	}
	npus := max(npusOf(before), npusOf(after))
	if s.way.apart {
		npus = npusOf(before) + npusOf(after)
	}
	hmm := []string{"hmm", "--nats-url", s.nats, "--node", nodeName, "--socket", s.hmm, "--npus", strconv.Itoa(npus),
		"--npu-memory", memory.String(), "--host-memory=256MiB", "--domains", c.Domains,
		"--weights-memory", conf.Bytes(sets * (int64(c.Bytes) + int64(c.Bytes)/8 + 256<<20)).String(), "--log-level=warn"}
	if c.Ready && s.way.change != nil {
		if s.ready, err = c.readyMemory(s.way, npus); err != nil {
			return err
		}
		hmm = append(hmm, "--ready-memory", strconv.FormatInt(s.ready, 10))
	}
	if s.way.frees {
		hmm = append(hmm, "--reserve=0")
	}
	if _, err := s.start("the HMM", nil, nil, nil, hmm...); err != nil {
		return err
	}
	flags := s.way.unlike
	if s.way.disk {
		flags = append(slices.Clone(flags), "--disk-rate", c.DiskRate.String())
	}
	if s.members, err = s.begin(before, flags...); err != nil {
		return err
	}
	there := s.members
	if s.way.standby {
		more, err := s.begin([]member{{name: secondName, roles: before[0].roles}})
		if err != nil {
			return err
		}
		there = append(slices.Clone(there), more...)
	}
	if err := s.serving(s.ctx, there); err != nil {
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
	return errors.Join(s.healthy(s.url), s.awaitReady())
}

func npusOf(members []member) (sum int) {
	for _, m := range members {
		sum += m.npus
	}
	return sum
}

// begin starts instances and returns them.
func (s *site) begin(members []member, flags ...string) (_ []member, err error) {
	members = slices.Clone(members)
	for i := range members {
		m := &members[i]
		args := []string{"stage", "--roles", m.roles, "--name", m.name, "--npus", strconv.Itoa(m.npus), "--threads", strconv.Itoa(max(1, m.npus)),
			"--nats-url", s.nats, "--hmm", s.hmm, "--model", s.model, "--data", s.dir, "--log-level=warn"}
		if p := s.scale.Pace; p != "" {
			args = append(args, "--pace", p)
		}
		if m.cmd, err = s.start("instance "+m.name, nil, nil, nil, append(args, flags...)...); err != nil {
			return nil, err
		}
	}
	return members, nil
}

// stopAll ends instances, all at once.
func (s *site) stopAll(members []member) {
	var all sync.WaitGroup
	for _, m := range members {
		all.Go(func() { s.stop(m.cmd) })
	}
	all.Wait()
}

// serving waits until instances serve on all of their NPUs.
func (s *site) serving(ctx context.Context, members []member) error {
	for _, m := range members {
		if _, err := s.find(ctx, m.name, m.npus); err != nil {
			return err
		}
	}
	return nil
}

// find waits until an instance serves on so many NPUs, and returns what it says of itself.
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
