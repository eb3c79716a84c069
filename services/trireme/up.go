package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sys/unix"

	"trireme.dev/models"
	"trireme.dev/services/gateway"
	"trireme.dev/services/gateway/media"
	"trireme.dev/services/hmm"
	"trireme.dev/services/trireme/supervise"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/embedded"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/imageprep"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/stage"
)

// upCmd runs everything on this machine. Each service is a child process of the same binary; NATS is embedded.
type upCmd struct {
	HTTP       string     `name:"http" help:"Address of the gateway; port 0: a free one." default:"127.0.0.1:8080"`
	NATS       string     `name:"nats" help:"Address of the embedded NATS; port 0: a free one." default:"127.0.0.1:4222"`
	Monitor    string     `help:"Address of NATS' monitoring pages; port 0: a free one." default:"127.0.0.1:8222"`
	NATSURL    string     `name:"nats-url" help:"An existing NATS server with JetStream, instead of the embedded one." placeholder:"URL"`
	Model      string     `help:"Hugging Face folder of the model; by default the bundled one." type:"path" placeholder:"DIR"`
	Topology   string     `help:"Instances: 2E1P1D is two encoders, one prefill, one decoder; 2EPD two that do all of it; 1Dx4 a decoder of four NPUs; 1Dx0 one that stands by without NPUs; +2 two spare NPUs." default:"1E1P1D"`
	Data       string     `help:"Folder for state: JetStream, the unpacked model, the HMM's socket." default:"${data}" type:"path"`
	Node       string     `help:"Name of this machine, which no other on the same NATS has; by default the host's." placeholder:"NAME"`
	PeerListen string     `help:"Address to serve device memory to the HMMs of other machines on the same NATS at, as :7400; none by default: then no request may pass between them." placeholder:"ADDR"`
	NPUMemory  conf.Bytes `name:"npu-memory" help:"Memory of each NPU; by default 4 GiB, or an NPU's share of half the machine's." placeholder:"SIZE"`
	HostMemory conf.Bytes `help:"Memory for pictures and long prompts." default:"1GiB"`
	Threads    int        `help:"Worker threads of each instance, shared by its host NPUs; 0: one for each core."`
	paceFlag
	indirectionFlag
	domainFlags
	cacheFlags
	orderFlags
	weightsFlags
	readyFlag
	scalerFlags
	accessFlags

	AllowMediaHost []string      `help:"Host or host:port that picture URLs may name whatever its address." placeholder:"HOST"`
	Grace          time.Duration `help:"Time for open requests to end after Ctrl-C or SIGTERM." default:"5s"`
}

// Help is shown by `trireme up --help`.
func (upCmd) Help() string {
	return `Examples:
  trireme up                                          the bundled model at http://127.0.0.1:8080
  trireme up --model ~/models/Qwen3-VL-30B-A3B-Instruct --topology 1E1P2D
  trireme up --topology 1EPD                          one instance that encodes, computes prompts and decodes
  trireme up --topology 1E1P1Dx4                      a decoder of four NPUs, over which the experts are spread
  trireme up --http 127.0.0.1:0 --nats 127.0.0.1:0 --monitor 127.0.0.1:0
                                                      beside another one, on free ports (give it its own --data)
  trireme up --topology 5E2P1D --pace epd-minicpm-a100
                                                      eight NPUs, each as slow as an A100 with another model
  trireme up --slo ttft:2s,tpot:100ms --late refuse   429 for what would come later than that
  trireme up --topology 1E1P1D+3 --scaler auto        stages get spare NPUs, and one another's, as the load wants it
  trireme up --http 0.0.0.0:8080 --api-key sk-1       clients need a key; TRIREME_API_KEY=sk-1,sk-2 shows it to nobody
  trireme up --allowed-origin http://localhost:3000   pages from there may ask from a browser
  trireme up --nats-url nats://10.0.0.5:4222          on an existing NATS server
  trireme up --nats-url nats://10.0.0.5:4222 --peer-listen :7400
                                                      one of several machines on it

/metrics is the gateway's. Other processes have theirs at addresses of their own: in a file of settings (--config) "metrics: 127.0.0.1:9101"
under encoder, prefill, decoder, stage or hmm says one. Of several of a kind each needs its own: with port 0 it takes a free one,
which trireme status --json names.

When all instances of the topology are there, and a request would succeed, "ready URL" is printed. Ctrl-C stops everything in order, a
second one, a second or more later, at once.`
}

// stopGrace is how long the processes of one layer get to stop before they are killed; the gateway gets its grace on top.
const stopGrace = 10 * time.Second

// Run starts everything, prints where it is ready, and stops it when the context ends.
func (c *upCmd) Run(e *env) error {
	p, err := c.plan()
	if err != nil {
		return err
	}
	if err := c.apply(&gateway.Config{}); err != nil { // or the gateway would say it again and again
		return err
	}
	if !validName.MatchString(c.node()) {
		return fmt.Errorf("%w--node %q: letters, digits, - and _, at most 64", errUsage, c.node())
	}
	if err := c.hmm(p).config().Validate(); err != nil {
		return fmt.Errorf("%wthe HMM does not start with --npu-memory %v, --host-memory %v, --weights-memory %v, --ready-memory %v and --data %s: %w",
			errUsage, p.memory, c.HostMemory, c.WeightsMemory, c.ReadyMemory, c.Data, err)
	}
	if err := errors.Join(c.scalerFlags.check(), c.accessFlags.check()); err != nil {
		return err
	}
	unlock, err := lockData(c.Data)
	if err != nil {
		return err
	}
	defer unlock()
	if p.model, err = modelDir(c.Model, c.Data); err != nil {
		return err
	}
	cfg, err := checkModel(p.model, p.topology)
	if err != nil {
		return err
	}
	p.must = []byte("EPD")
	if cfg.Vision == nil { // encoders would have nothing to do
		p.topology, p.must = p.topology.Without('E'), []byte("PD")
	}
	if p.sole, err = readSoles(e.settings); err != nil {
		return err
	}
	others := []string{"hmm"}
	if c.Scaler != "off" {
		others = append(others, "scaler run")
	}
	if err := p.sole.checkTopology(p.topology, others...); err != nil {
		return fmt.Errorf("%wtopology %s: %w", errUsage, p.topology, err)
	}
	if err := checkMemory(&cfg.Text, p.memory); err != nil {
		return err
	}
	if err := c.checkWeights(p); err != nil {
		return err
	}
	if c.NATSURL != "" {
		if err := checkNATS(e.ctx, c.NATSURL); err != nil {
			return err
		}
	}
	if p.http, err = free(c.HTTP, "--http"); err != nil {
		return err
	}
	if c.PeerListen != "" {
		if _, err = free(c.PeerListen, "--peer-listen"); err != nil {
			return err
		}
	}
	if c.NATSURL == "" {
		server, err := c.startNATS(e)
		if err != nil {
			return err
		}
		defer server.Shutdown()
		p.natsURL = server.URL()
		fmt.Fprintf(e.err, "nats      %s  monitoring %s\n", server.URL(), server.MonitorURL())
	}
	if err := c.forgetLayouts(e.ctx, p); err != nil {
		return err
	}
	return c.serve(e, p)
}

// plan is what up has found out before anything is started.
type plan struct {
	topology conf.Topology
	natsURL  string
	model    string
	http     string
	socket   string
	memory   conf.Bytes // of each NPU
	must     []byte     // roles that some instance has to have
	sole     soles      // services of which there can be one instance
}

func (c *upCmd) plan() (*plan, error) {
	t, err := conf.ParseTopology(c.Topology)
	if err != nil {
		return nil, err
	}
	for _, g := range t.Groups {
		if g.NPUs > placement.MaxNPUs {
			return nil, fmt.Errorf("%wtopology %s: an instance has at most %d NPUs", errUsage, t, placement.MaxNPUs)
		}
	}
	for _, role := range []byte("PD") {
		if t.Instances(role) == 0 {
			return nil, fmt.Errorf("%wtopology %s has no instance with role %c", errUsage, t, role)
		}
	}
	if c.Pace != "" {
		if _, err := pace.Load(c.Pace); err != nil {
			return nil, fmt.Errorf("--pace: %w", err)
		}
	}
	for _, h := range c.AllowMediaHost {
		if err := media.CheckHost(h); err != nil {
			return nil, fmt.Errorf("%w--allow-media-host: %w", errUsage, err)
		}
	}
	p := &plan{topology: t, natsURL: c.NATSURL, memory: c.NPUMemory, socket: filepath.Join(c.Data, "hmm.sock")}
	if len(p.socket) > 107 { // sizeof(sockaddr_un.sun_path)-1, unix(7)
		return nil, fmt.Errorf("%w--data %s is too long a path for a Unix socket in it: give a shorter one", errUsage, c.Data)
	}
	if p.memory == 0 {
		p.memory = defaultMemory(t.NPUs())
	}
	return p, nil
}

// node is the name of this machine.
func (c *upCmd) node() string { return cmp.Or(c.Node, nodeName()) }

// hmm is the command that runs the HMM, as the flags have it: checked before, and then started, with the same settings.
func (c *upCmd) hmm(p *plan) *hmmCmd {
	return &hmmCmd{
		Socket: p.socket, Node: c.node(), NPUs: p.topology.NPUs(), NPUMemory: p.memory, HostMemory: c.HostMemory, PeerListen: c.PeerListen,
		domainFlags: c.domainFlags, weightsFlags: c.weightsFlags, readyFlag: c.readyFlag, cacheFlags: c.cacheFlags,
	}
}

// defaultMemory is an NPU's memory: 4 GiB, but all NPUs together at most half of the machine's. It is an upper bound:
// pages are taken from the system as they are used.
func defaultMemory(npus int) conf.Bytes {
	most := conf.Bytes(4 << 30)
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return most
	}
	return min(most, conf.Bytes(uint64(info.Totalram)*uint64(info.Unit)/2/uint64(npus)))
}

// modelDir is the given folder, or the bundled model unpacked.
func modelDir(given, data string) (string, error) {
	if given == "" {
		return models.Unpack(data)
	}
	if info, err := os.Stat(given); errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
		return "", fmt.Errorf("%w--model %s: there is no such folder, and models are not downloaded: fetch one first, as with "+
			"`hf download NAME --local-dir DIR`, or leave --model out for the bundled one", errUsage, given)
	}
	if _, err := os.Stat(filepath.Join(given, "config.json")); errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%w--model %s: it has no config.json, so it is not the folder of a Hugging Face model", errUsage, given)
	}
	return given, nil
}

// checkModel reads everything of a model folder but the weights' content, so that what is missing or cannot be used is
// said at once and not by a service that is started again and again.
func checkModel(dir string, t conf.Topology) (*model.Config, error) {
	m, err := gateway.NewModel(dir, nil)
	if err != nil {
		return nil, fmt.Errorf("%w%w", errUsage, err)
	}
	if m.Config.Vision == nil {
		return &m.Config, nil
	}
	if _, err := imageprep.LoadConfig(dir); err != nil {
		return nil, fmt.Errorf("%w%w", errUsage, err)
	}
	if t.Instances('E') == 0 {
		return nil, fmt.Errorf("%wtopology %s has no instance with role E, and %s takes pictures: write 1E%s", errUsage, t, dir, t)
	}
	return &m.Config, nil
}

// checkMemory refuses NPUs that cannot hold the KV of the shortest request: one slab, and a token log.
func checkMemory(cfg *model.Text, memory conf.Bytes) error {
	slab := kv.SlabBytes(cfg)
	tokens := kv.SlabBlocks * model.BlockTokens
	log := kv.LogShape{Prompt: 1, MaxTokens: tokens - 1, MaxSlabs: 3}.Bytes()
	if least := conf.Bytes(mem.Padded(slab, mem.HostPage) + mem.Padded(log, mem.HostPage)); memory < least {
		return fmt.Errorf("%w--npu-memory %v is too small: a request of %d tokens with this model takes %v, and the whole "+
			"context of %d tokens about %v", errUsage, memory, tokens, least, cfg.Context,
			conf.Bytes(slab)*conf.Bytes(kv.Slabs(cfg.Context)))
	}
	return nil
}

// checkWeights refuses a model whose weights do not fit into what a memory domain may have of them. Those for encoding and
// those for the rest are two sets, in one domain or in several; where each NPU is a domain it has its own share of the experts.
func (c *upCmd) checkWeights(p *plan) error {
	f, err := hf.Open(p.model)
	if err != nil {
		return err
	}
	defer f.Close()
	need := func(part hf.Parts, wanted hf.Experts) conf.Bytes {
		set, nerr := f.Needs(part, wanted)
		err = cmp.Or(err, nerr)
		var sum conf.Bytes
		for _, n := range set.Sizes {
			sum += conf.Bytes(mem.Padded(n, mem.HostPage))
		}
		return sum
	}
	domains, vision := 1, need(hf.Vision, nil)
	all := vision + need(hf.Text, nil)
	if c.Domains == "per-npu" {
		domains, all = p.topology.NPUs(), 0
		for _, g := range p.topology.Groups {
			var own conf.Bytes
			if strings.Contains(g.Roles, "E") {
				own = vision
			}
			if g.Roles != "E" { // the first NPU has as many experts as any
				layout := stage.Layout(&f.Config.Text, placement.First(max(1, g.NPUs)))
				own += need(hf.Text, func(layer, expert int) bool { return layout[layer][expert].Has(0) })
			}
			all = max(all, own)
		}
	}
	if err != nil {
		return err
	}
	room := cmp.Or(c.WeightsMemory, conf.Bytes(hmm.DefaultWeights(domains)))
	if all > room {
		return fmt.Errorf("%wthe weights of %s take %v of shared memory in each memory domain, which has %v for them: give more with "+
			"--weights-memory, if the machine has it, or choose a smaller model", errUsage, p.model, all, room)
	}
	return nil
}

// checkNATS asks an existing server once whether it can be used.
func checkNATS(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	nc, err := nats.Connect(url, nats.Timeout(5*time.Second))
	if err != nil {
		return fmt.Errorf("%w--nats-url, or TRIREME_NATS_URL: %w; without either up starts a NATS of its own", errUsage, bus.ConnectError(url, err))
	}
	defer nc.Close()
	if v := nc.ConnectedServerVersion(); tooOld(v) {
		return fmt.Errorf("%w--nats-url %s: nats-server %s is too old; queues that give work to the idlest instance need 2.12", errUsage, bus.Redacted(url), v)
	}
	js, err := jetstream.New(nc)
	if err == nil {
		_, err = js.AccountInfo(ctx)
	}
	if err != nil {
		return fmt.Errorf("%w--nats-url %s: no JetStream there (start nats-server with -js): %w", errUsage, bus.Redacted(url), err)
	}
	return nil
}

// tooOld reports whether a version of nats-server, as 2.15.2, has no prioritized consumers. One that cannot be read is tried.
func tooOld(version string) bool {
	var major, minor int
	if _, err := fmt.Sscanf(version, "%d.%d", &major, &minor); err != nil {
		return false
	}
	return major < 2 || major == 2 && minor < 12
}

// lockData keeps two ups from sharing a data folder.
func lockData(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("%wmaking the data folder: %w", errUsage, err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "up.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%wlocking the data folder: %w", errUsage, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%wanother `trireme up` uses the data folder %s: stop it, or give this one its own --data", errUsage, dir)
	}
	return func() { f.Close() }, nil
}

// free checks that an address can be listened on and returns it with a port.
func free(addr, flag string) (string, error) {
	l, err := net.Listen("tcp", addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		return "", fmt.Errorf("%wport of %s %s is in use: stop what listens there, or give another", errUsage, flag, addr)
	}
	if err != nil {
		return "", fmt.Errorf("%w%s %s: %w", errUsage, flag, addr, err)
	}
	defer l.Close()
	return l.Addr().String(), nil
}

func (c *upCmd) startNATS(e *env) (*embedded.Server, error) {
	o := embedded.Options{StoreDir: filepath.Join(c.Data, "jetstream"), Log: e.log}
	for _, x := range []struct {
		flag, addr string
		host       *string
		port       *int
	}{{"--nats", c.NATS, &o.Host, &o.Port}, {"--monitor", c.Monitor, &o.MonitorHost, &o.MonitorPort}} {
		host, port, err := net.SplitHostPort(x.addr)
		if err == nil {
			*x.port, err = strconv.Atoi(port)
		}
		if err != nil {
			return nil, fmt.Errorf("%w%s %s is no address like 127.0.0.1:4222", errUsage, x.flag, x.addr)
		}
		*x.host = host
		if _, err := free(x.addr, x.flag); err != nil {
			return nil, err
		}
	}
	return embedded.Start(o)
}

// children are the processes of a plan.
type children struct {
	gateway, hmm supervise.Child
	scaler       *supervise.Child                                // nil: there is none
	stage        func(g conf.Group, name string) supervise.Child // one of a group
}

func (c *upCmd) children(e *env, p *plan, binary string) children {
	// What must differ from child to child cannot come from the environment that they share, and keys are for the gateway alone.
	environ := slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "TRIREME_METRICS=") || strings.HasPrefix(v, "TRIREME_NAME=") || strings.HasPrefix(v, keysVariable+"=")
	})
	environ = append(environ, "TRIREME_NATS_URL="+p.natsURL) // which may have a password, and everybody can read arguments
	child := func(name, service string, args ...string) supervise.Child {
		return supervise.Child{Name: name, Path: binary, Args: slices.Concat([]string{service}, args, e.inherit), Env: environ}
	}
	common := []string{"--hmm", p.socket, "--model", p.model, "--data", c.Data}
	gateway := slices.Concat([]string{"--http", p.http, "--grace", c.Grace.String(), "--notice", "0s"}, common, c.orderFlags.args(), c.accessFlags.args())
	for _, h := range c.AllowMediaHost {
		gateway = append(gateway, "--allow-media-host", h)
	}
	stage := func(g conf.Group, name string) supervise.Child {
		service := bus.ServiceOf(g.Roles)
		args := slices.Concat(common, []string{"--name", name, "--npus", strconv.Itoa(g.NPUs)})
		if service == "stage" {
			args = append(args, "--roles", g.Roles)
		}
		if c.Threads > 0 {
			args = append(args, "--threads", strconv.Itoa(c.Threads))
		}
		if c.Indirection != "" {
			args = append(args, "--indirection", c.Indirection)
		}
		if c.Pace != "" {
			args = append(args, "--pace", c.Pace)
		}
		if strings.Contains(g.Roles, "P") {
			args = append(args, c.policyFlag.args()...)
		}
		return child(name, service, args...)
	}
	front := child("gateway", "gateway", gateway...)
	front.Env = slices.Concat(environ, c.accessFlags.environ())
	return children{
		gateway: front, hmm: child("hmm", "hmm", c.hmm(p).args()...), stage: stage,
		scaler: c.scaler(child),
	}
}

// serve runs the children until the context ends.
func (c *upCmd) serve(e *env, p *plan) error {
	binary, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding the binary: %w", err)
	}
	ctx, cancel := context.WithCancelCause(e.ctx)
	defer cancel(nil)
	var ready atomic.Bool
	s := supervise.New(e.err, func(x supervise.Exit) {
		if x.Code == exitUsage && !ready.Load() { // it has said why; trying again will not help
			cancel(fmt.Errorf("%w%s cannot start", errUsage, x.Child.Name))
			return
		}
		fmt.Fprintf(e.err, "%s (pid %d) ended: %s; starting it again in %v\n", x.Child.Name, x.PID, x.How, x.Again)
	})
	all := c.children(e, p, binary)
	s.Start(all.hmm)
	stages := &replicas{make: all.stage, must: p.must, sole: p.sole, model: p.model, supervisor: s, named: map[string]int{}, out: e.err}
	stages.begin(p.topology)
	s.Start(all.gateway)
	if all.scaler != nil {
		s.Start(*all.scaler)
	}
	leave, err := stages.serve(ctx, p.natsURL, c.node())
	if err != nil {
		return errors.Join(err, c.stop(e.err, s, stages.names()))
	}
	fmt.Fprintf(e.err, "model     %s\ntopology  %s, %v for each NPU\n", p.model, p.topology, p.memory)
	if c.Pace != "" {
		fmt.Fprintf(e.err, "paced     NPUs are slowed down to %s: figures are of that profile, not of this machine\n", c.Pace)
	}

	address := "http://" + p.http
	loaded := watchLoading(ctx, p.natsURL, e.err)
	err = waitHealthy(ctx, address, e.err)
	if err == nil {
		err = waitStages(ctx, p.natsURL, c.node(), stages.names, e.err)
	}
	loaded()
	if err == nil {
		ready.Store(true)
		fmt.Fprintln(e.out, "ready", address)
		<-ctx.Done()
	}
	leave()
	return errors.Join(c.stop(e.err, s, stages.names()), failure(ctx, e.ctx))
}

// failure is why ctx ended, nil when the user ended it.
func failure(ctx, user context.Context) error {
	if user.Err() != nil {
		return nil
	}
	return context.Cause(ctx)
}

// stop ends the processes layer by layer: who changes them first, then the gateway.
func (c *upCmd) stop(w io.Writer, s *supervise.Supervisor, stages []string) error {
	var errs []error
	for _, layer := range []struct {
		names []string
		grace time.Duration
	}{{c.scalerNames(), stopGrace}, {[]string{"gateway"}, stopGrace + c.Grace}, {stages, stopGrace}, {[]string{"hmm"}, stopGrace}} {
		if len(layer.names) == 0 {
			continue
		}
		fmt.Fprintf(w, "stopping  %s\n", strings.Join(layer.names, ", "))
		errs = append(errs, s.Stop(layer.grace, layer.names...))
	}
	return errors.Join(errs...)
}
