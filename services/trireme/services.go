package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"trireme.dev/models"
	"trireme.dev/services/decoder"
	"trireme.dev/services/encoder"
	"trireme.dev/services/gateway"
	"trireme.dev/services/gateway/media"
	"trireme.dev/services/hmm"
	"trireme.dev/services/prefill"
	"trireme.dev/services/trireme/modelcmd"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/npu"
	"trireme.dev/shared/obs"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/transfer"
	"trireme.dev/shared/wire"
)

// connectFlags are what every service needs.
type connectFlags struct {
	NATSURL string `name:"nats-url" help:"NATS server, or those of a cluster with commas between." default:"nats://127.0.0.1:4222"`
	HMM     string `name:"hmm" help:"Socket of the node's HMM." default:"${data}/hmm.sock" type:"path"`
	Model   string `help:"Hugging Face folder of the model; by default the bundled one." type:"path"`
	Data    string `help:"Folder for state and the unpacked model." default:"${data}" type:"path"`
	ackFlag
}

// ackFlag must say the same to all that use one NATS.
type ackFlag struct {
	Replicas int           `help:"Servers of a NATS cluster that have each message; 0: three where there are three, else one. What is there stays as it is unless this says a number. The same for everything on one NATS." default:"0" placeholder:"N"`
	AckWait  time.Duration `help:"Time without a sign of life after which a message goes to another instance; the same for everything on one NATS." default:"30s" hidden:""`
}

// stageFlags are what every stage needs.
type stageFlags struct {
	connectFlags
	Name    string `help:"Stable name of the instance, of which no other that runs has the same: its id is this and a random suffix, and the HMM keeps its NPUs for a while for the process that is started in its place. None by default." placeholder:"NAME"`
	Metrics string `help:"Address for /metrics, /live and /health; port 0: a free one, which status --json names. None by default." placeholder:"ADDR"`
	NPUs    int    `name:"npus" help:"NPUs of the instance: each has sequences of its own, experts are spread over all. 0: it is a standby, which trireme scale gives some." default:"1"`
	Threads int    `help:"Worker threads of the instance's host NPUs together; 0: one for each core."`
	Backend string `help:"Compute backend: host, or reference (plain Go, slow)." default:"host" enum:"host,reference"`
	paceFlag
	indirectionFlag
	Drain        time.Duration `help:"Time for pictures and prompts in work to be finished after SIGTERM; what takes longer is handed to others. Sequences are handed to others at once." default:"${drain}"`
	GatewayLease time.Duration `help:"Time without a sign of life of a gateway after which its requests are given up." default:"${lease}"`
	OfferWait    time.Duration `help:"Most that work waits longer at an instance that has what it needs in its memory (a cached prompt, pictures, KV) than elsewhere, where that would be copied; 0: it stays with whoever is idle first." default:"${offerWait}"`

	OwnWeights bool       `help:"Read the weights from disk although another process has them." hidden:""`
	DiskRate   conf.Bytes `help:"Bytes a second that weights are read from disk with which others have; 0: as they come." default:"0" hidden:""`
	Without    []string   `help:"Do without remap, copies between memory domains, or both, to measure what these are worth." enum:"remap,copies" hidden:""`

	mixed sched.Mixed // zero: the default
}

// paceFlag slows host NPUs down.
type paceFlag struct {
	Pace string `help:"Slow NPUs down to the rates of a profile, so that many on a few cores behave as a fleet: ${profiles}, or a file FILE.yaml. All figures are labelled so." placeholder:"NAME"`
}

// indirectionFlag says how kernels find experts.
type indirectionFlag struct {
	Indirection string `help:"How kernels find the experts of an NPU: by a table of pointers, or in ranges of addresses, one a layer, that an operation maps anew." default:"table" enum:"table,ranges"`
}

var validName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// atLeastOne checks flags, each a name and a number.
func atLeastOne(flags ...any) error {
	for i := 0; i < len(flags); i += 2 {
		if n := flags[i+1].(int); n < 1 {
			return fmt.Errorf("%w%s %d, must be at least 1", errUsage, flags[i], n)
		}
	}
	return nil
}

// run opens a stage and serves it; serve gets the open stage.
func (f *stageFlags) run(e *env, role string, serve func(context.Context, *stage.Stage) error) error {
	if f.NPUs < 0 || f.NPUs > placement.MaxNPUs {
		return fmt.Errorf("%w--npus %d: an instance has 0 to %d", errUsage, f.NPUs, placement.MaxNPUs)
	}
	if f.Name != "" && !validName.MatchString(f.Name) {
		return fmt.Errorf("%w--name %q: letters, digits, - and _, at most 64", errUsage, f.Name)
	}
	model, err := modelDir(f.Model, f.Data)
	if err != nil {
		return err
	}
	without, err := stage.ParseWithout(f.Without)
	if err != nil {
		return fmt.Errorf("%w--%w", errUsage, err)
	}
	if err := checkAddress("--metrics", f.Metrics); err != nil {
		return err
	}
	s, err := stage.Open(e.ctx, role, stage.Config{
		NATSURL: f.NATSURL, HMM: f.HMM, Model: model, Name: f.Name, Metrics: f.Metrics,
		AckWait: f.AckWait, Replicas: f.Replicas, Lease: f.GatewayLease, Drain: cmp.Or(f.Drain, -1),
		NPU:       npu.Options{Backend: f.Backend, Threads: f.Threads, Pace: f.Pace},
		OfferWait: cmp.Or(f.OfferWait, -1),
		NPUs:      f.NPUs, Standby: f.NPUs == 0,
		Mixed:       f.mixed,
		Indirection: f.Indirection,
		OwnWeights:  f.OwnWeights, DiskRate: int64(f.DiskRate), Without: without,
		Loading: modelcmd.LoadProgress(e.err, modelcmd.LoadingWeights),
	}, e.log)
	if err != nil {
		return err
	}
	defer s.Close()
	if f.Metrics != "" {
		obs.AddProcess(s.Metrics.Registry)
		ctx, cancel := context.WithCancel(context.WithoutCancel(e.ctx)) // a stage that stops says for a while that it is not ready
		defer cancel()
		served, err := obs.Serve(ctx, f.Metrics, s.Metrics.Registry, s.Ready, e.log)
		if err != nil {
			return err
		}
		if !fixedPort(f.Metrics) {
			s.MetricsAt(served.Addr())
		}
	}
	return serve(e.ctx, s)
}

type encoderCmd struct{ stageFlags }

// Help is shown by `trireme encoder --help`.
func (encoderCmd) Help() string {
	return `It needs NATS and the HMM of its node, and waits for them.

Examples:
  trireme encoder
  trireme encoder --nats-url nats://10.0.0.5:4222 --metrics :9090
  trireme encoder --name encoder-1 --npus 2`
}

// Run runs an encoder.
func (c *encoderCmd) Run(e *env) error { return c.run(e, stage.Encode, encoder.Serve) }

type prefillCmd struct {
	stageFlags
	Rows  int `help:"Most prompt tokens of one batch on each NPU." default:"512"`
	Slots int `help:"Requests in work at once on each NPU." default:"32"`
	policyFlag
}

// Help is shown by `trireme prefill --help`.
func (prefillCmd) Help() string {
	return `It needs NATS and the HMM of its node, and waits for them.

Examples:
  trireme prefill
  trireme prefill --nats-url nats://10.0.0.5:4222 --metrics :9090
  trireme prefill --npus 2 --policy sjf`
}

// Run runs a prefill instance.
func (c *prefillCmd) Run(e *env) error {
	policy, err := c.policy()
	if err != nil {
		return err
	}
	if err := atLeastOne("--rows", c.Rows, "--slots", c.Slots); err != nil {
		return err
	}
	return c.run(e, stage.Prefill, func(ctx context.Context, s *stage.Stage) error {
		return prefill.Serve(ctx, s, prefill.Config{Rows: c.Rows, Slots: c.Slots, Policy: policy})
	})
}

type decoderCmd struct {
	stageFlags
	Slots int `help:"Sequences in work at once on each NPU." default:"256"`
}

// Help is shown by `trireme decoder --help`.
func (decoderCmd) Help() string {
	return `It needs NATS and the HMM of its node, and waits for them.

Examples:
  trireme decoder
  trireme decoder --nats-url nats://10.0.0.5:4222 --metrics :9090
  trireme decoder --npus 4                      its experts are spread over four NPUs
  trireme decoder --name standby --npus 0       trireme scale standby 1 gives it an NPU`
}

// Run runs a decoder.
func (c *decoderCmd) Run(e *env) error {
	if err := atLeastOne("--slots", c.Slots); err != nil {
		return err
	}
	return c.run(e, stage.Decode, func(ctx context.Context, s *stage.Stage) error {
		return decoder.Serve(ctx, s, decoder.Config{Slots: c.Slots})
	})
}

// stageCmd runs several roles in one process: what the commands of single roles run, beside one another on the same NPUs.
type stageCmd struct {
	stageFlags
	Roles     string `help:"What the instance does, by letters: E encodes, P computes prompts, D decodes. EPD does all of it." required:"" placeholder:"EPD"`
	Rows      int    `help:"Most prompt tokens of one batch on each NPU." default:"512"`
	Requests  int    `help:"Requests whose prompts are in work at once on each NPU." default:"32"`
	Sequences int    `help:"Sequences that decode at once on each NPU." default:"256"`
	policyFlag

	StepTokens int `help:"Most tokens of a step in which prompts are computed beside sequences that decode: fewer make gaps between tokens shorter, more make first tokens come sooner." default:"${stepTokens}"`
	StepBlocks int `help:"Most KV blocks that the tokens of such a step attend to together; 0: any number." default:"${stepBlocks}"`
}

// Help is shown by `trireme stage --help`.
func (stageCmd) Help() string {
	return `Examples:
  trireme stage --roles EPD                     encodes, computes prompts and decodes
  trireme stage --roles PD --step-tokens 64     prompts and decoding, with shorter gaps between tokens
  trireme stage --roles D --npus 4              decodes on four NPUs, with the experts spread over them

One role alone is what the commands encoder, prefill and decoder run. In 'trireme up --topology
2EPD1D' instances with several roles are run by this command.`
}

// Run runs an instance with several roles.
func (c *stageCmd) Run(e *env) error {
	if err := conf.CheckRoles(c.Roles); err != nil {
		return fmt.Errorf("%w--roles: %w", errUsage, err)
	}
	if err := atLeastOne("--rows", c.Rows, "--requests", c.Requests, "--sequences", c.Sequences, "--step-tokens", c.StepTokens); err != nil {
		return err
	}
	policy, err := c.policy()
	if err != nil {
		return err
	}
	of := map[rune]stage.Role{
		'E': encoder.Role(),
		'P': prefill.Role(prefill.Config{Rows: c.Rows, Slots: c.Requests, Policy: policy}),
		'D': decoder.Role(decoder.Config{Slots: c.Sequences}),
	}
	var roles []stage.Role
	var names []string
	for _, letter := range c.Roles {
		roles = append(roles, of[letter])
		names = append(names, of[letter].Name)
	}
	c.mixed = stage.MixedDefault
	c.mixed.Tokens, c.mixed.Blocks = c.StepTokens, c.StepBlocks
	return c.run(e, strings.Join(names, wire.RoleSeparator), func(ctx context.Context, s *stage.Stage) error {
		return s.Serve(ctx, roles...)
	})
}

type gatewayCmd struct {
	connectFlags
	Name           string        `help:"Instance id; by default the role and a random suffix." placeholder:"ID"`
	HTTP           string        `name:"http" help:"Address of the OpenAI-compatible API." default:"127.0.0.1:8080"`
	Admin          string        `help:"Address for operators: instances, and changes of them. None by default, as whoever reaches it can change instances: no API key opens or closes it." placeholder:"ADDR"`
	ServedName     string        `help:"Model name that clients use; by default the folder's." placeholder:"NAME"`
	MaxBody        conf.Bytes    `help:"Largest request body." default:"64MiB"`
	MaxOpen        int           `help:"Requests in work at most." default:"1024"`
	QueueWait      time.Duration `help:"Longest wait for capacity before a request is refused with 429." default:"30s"`
	Deadline       time.Duration `help:"Longest life of a request." default:"10m"`
	Grace          time.Duration `help:"Time for open requests to end after SIGTERM; then their clients get an error." default:"25s"`
	Notice         time.Duration `help:"Time after SIGTERM in which new requests are still taken although /health says 503, for load balancers to notice." default:"0s"`
	AllowMediaHost []string      `help:"Host or host:port that picture URLs may name whatever its address." placeholder:"HOST"`
	MaxQueue       int           `help:"Requests waiting for capacity at most." default:"1024"`
	DeadLetters    string        `help:"What is stored for a day of requests that fail for good and not by their clients' fault: whole (with body and pictures, so that they can be replayed), facts or off." default:"whole" enum:"whole,facts,off"`
	Ahead          int           `help:"Requests without their first token that are let in for each NPU that encodes or computes prompts; others wait, where they are put in order." default:"32"`
	accessFlags
	orderFlags
}

// Help is shown by `trireme gateway --help`.
func (gatewayCmd) Help() string {
	return `Examples:
  trireme gateway --slo ttft:2s,tpot:100ms --late refuse
  trireme gateway --class gold=priority:-5,ttft:500ms --class batch=priority:20,ttft:none
  trireme gateway --policy sjf --tenant-weight search=3
  trireme gateway --api-key sk-1 --api-key sk-2       two keys; better in TRIREME_API_KEY, with a comma between
  trireme gateway --allowed-origin https://app.example.com --allowed-origin http://localhost:3000

The address of --admin is for operators alone, and asks for no key: let it be one that only they reach, as 127.0.0.1:8081.`
}

// Run runs the gateway.
func (c *gatewayCmd) Run(e *env) error {
	model, err := modelDir(c.Model, c.Data)
	if err != nil {
		return err
	}
	if c.Model == "" && c.ServedName == "" {
		c.ServedName = models.Default
	}
	cfg := gateway.Config{
		HTTP: c.HTTP, Admin: c.Admin, NATSURL: c.NATSURL, HMMSocket: c.HMM, ModelDir: model, ModelName: c.ServedName, Instance: c.Name,
		MaxBody: int64(c.MaxBody), MaxOpen: c.MaxOpen, MaxQueue: c.MaxQueue, Ahead: c.Ahead, DeadLetters: c.DeadLetters, QueueWait: c.QueueWait, Deadline: c.Deadline, Grace: c.Grace, Notice: c.Notice,
		AckWait: c.AckWait, Replicas: c.Replicas, Keys: c.keys(), Origins: c.AllowedOrigin,
		Media: media.Config{AllowHosts: c.AllowMediaHost},
	}
	if err := c.apply(&cfg); err != nil {
		return err
	}
	if err := errors.Join(c.accessFlags.check(), checkAddress("--http", c.HTTP), checkAddress("--admin", c.Admin)); err != nil {
		return err
	}
	if err := cfg.Validate(); err != nil {
		return fmt.Errorf("%w%w", errUsage, err)
	}
	return gateway.Run(e.ctx, cfg, e.log)
}

type hmmCmd struct {
	NATSURL    string     `name:"nats-url" help:"NATS server, or those of a cluster with commas between; empty: none, then requests end by their deadlines only." default:"nats://127.0.0.1:4222"`
	Socket     string     `help:"Unix socket to listen on." default:"${data}/hmm.sock" type:"path"`
	Node       string     `help:"Name of the node; by default the host's."`
	NPUs       int        `name:"npus" help:"Host NPUs of the node." default:"8"`
	NPUMemory  conf.Bytes `name:"npu-memory" help:"Memory of each NPU." default:"4GiB"`
	HostMemory conf.Bytes `help:"Memory for pictures and long prompts." default:"1GiB"`
	domainFlags
	Metrics string `help:"Address for /metrics, /live and /health; none by default." placeholder:"ADDR"`

	weightsFlags
	readyFlag

	Reserve time.Duration `help:"Time for which the NPUs of a named instance that has ended are kept for the next one of its name; 0: they are not." default:"${reserve}"`

	PeerListen   string            `help:"Address to serve objects to other nodes' HMMs at; none by default." placeholder:"ADDR"`
	PeerAnnounce string            `help:"Address that other nodes are told to reach --peer-listen at; by default that one, and for a wildcard address the one that NATS sees." placeholder:"ADDR"`
	Peer         map[string]string `help:"Where another node's HMM serves objects, instead of what that HMM announces on NATS; may be repeated." placeholder:"NODE=ADDR"`
	PeerCert     string            `help:"This node's certificate for TLS between nodes; it must name the node." type:"existingfile"`
	PeerKey      string            `help:"Key of --peer-cert." type:"existingfile"`
	PeerCA       string            `name:"peer-ca" help:"Certificate of the authority that all nodes' certificates come from." type:"existingfile"`

	cacheFlags
}

// peers is how the HMM exchanges objects with other nodes.
func (c *hmmCmd) peers() (*hmm.Peers, error) {
	p := &hmm.Peers{Listen: c.PeerListen, Announce: c.PeerAnnounce, Known: c.Peer}
	if c.PeerCert != "" || c.PeerKey != "" || c.PeerCA != "" {
		var err error
		if p.TLS, err = transfer.MutualTLS(c.PeerCert, c.PeerKey, c.PeerCA); err != nil {
			return nil, fmt.Errorf("TLS between nodes: %w", err)
		}
	}
	return p, nil
}

// domainFlags say which NPUs can map each other's memory.
type domainFlags struct {
	Domains string `help:"Memory domains of host NPUs: one for the node, in which memory changes hands by mapping, or one for each NPU, between which it is copied." default:"node" enum:"node,per-npu"`
}

// weightsFlags say how much memory weights may take.
type weightsFlags struct {
	WeightsMemory conf.Bytes `help:"Most memory for weights in each memory domain, beside that of the NPUs; by default half of the machine's for all." placeholder:"SIZE"`
}

// readyFlag says how much memory is taken from the system before it is wanted.
type readyFlag struct {
	ReadyMemory conf.Bytes `help:"Memory of each NPU that the HMM takes from the system before anybody wants it, as long as a sixteenth of the machine's is free, and keeps beside what is in use. Who adds, shrinks or moves NPUs then does not wait for it, as it would not on an accelerator: on virtual machines memory that is touched first comes at less than 1 GB/s." default:"0" placeholder:"SIZE"`
}

// cacheFlags say how much memory the caches may keep.
type cacheFlags struct {
	MMCache *conf.Bytes `name:"mm-cache" help:"Memory on each NPU for encoded pictures that nobody uses now; 0: none. By default a quarter." placeholder:"SIZE"`
	KVCache *conf.Bytes `name:"kv-cache" help:"Memory on each NPU for keys and values that nobody uses now, for prompts that begin alike; 0: none. By default half." placeholder:"SIZE"`
}

// cacheBytes is the hmm.Config's form of a flag.
func cacheBytes(flag *conf.Bytes) int64 {
	switch {
	case flag == nil:
		return 0 // the default
	case *flag == 0:
		return -1 // none
	}
	return int64(*flag)
}

// config is what the flags say of the HMM itself.
func (c *hmmCmd) config() hmm.Config {
	return hmm.Config{
		Socket: c.Socket, Node: c.Node, NPUs: c.NPUs, NPUBytes: int64(c.NPUMemory), HostBytes: int64(c.HostMemory),
		PerNPU: c.Domains == "per-npu", Weights: int64(c.WeightsMemory), Ready: int64(c.ReadyMemory),
		Reserve: cmp.Or(c.Reserve, -1),
		MMCache: cacheBytes(c.MMCache), KVCache: cacheBytes(c.KVCache),
	}
}

// args are the flags that up has, for a command line. What is left to its default is left out, so that the environment or a file may say it.
func (c *hmmCmd) args() []string {
	bytes := func(n conf.Bytes) string { return strconv.FormatInt(int64(n), 10) }
	args := []string{"--socket", c.Socket, "--node", c.Node, "--npus", strconv.Itoa(c.NPUs), "--npu-memory", bytes(c.NPUMemory),
		"--host-memory", bytes(c.HostMemory), "--domains", c.Domains}
	if c.WeightsMemory != 0 {
		args = append(args, "--weights-memory", bytes(c.WeightsMemory))
	}
	if c.ReadyMemory != 0 {
		args = append(args, "--ready-memory", bytes(c.ReadyMemory))
	}
	if c.MMCache != nil {
		args = append(args, "--mm-cache", bytes(*c.MMCache))
	}
	if c.KVCache != nil {
		args = append(args, "--kv-cache", bytes(*c.KVCache))
	}
	if c.PeerListen != "" {
		args = append(args, "--peer-listen", c.PeerListen)
	}
	return args
}

// Help is shown by `trireme hmm --help`.
func (hmmCmd) Help() string {
	return `One runs on each node. It must start before the stages and outlive them: what they hold in device memory ends with it.

Examples:
  trireme hmm --npus 4 --npu-memory 2GiB
  trireme hmm --npus 4 --domains per-npu --ready-memory 1GiB          a change of NPUs does not wait for the machine's memory
  trireme hmm --nats-url nats://10.0.0.5:4222 --peer-listen :7400     one of several nodes
  trireme hmm --peer-listen :7400 --peer node2=10.0.0.6:7400          another one that NATS does not tell of`
}

// Run runs the HMM.
func (c *hmmCmd) Run(e *env) error {
	if c.Node == "" {
		c.Node = nodeName()
	}
	if err := errors.Join(checkAddress("--metrics", c.Metrics), checkAddress("--peer-listen", c.PeerListen)); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(c.Socket), 0o700); err != nil {
		return fmt.Errorf("making the socket's folder: %w", err)
	}
	peers, err := c.peers()
	if err != nil {
		return err
	}
	var conn *nats.Conn
	if c.NATSURL != "" {
		lost := func(nc *nats.Conn) { // the node goes on, by the socket
			if why := nc.LastError(); e.ctx.Err() == nil && why != nil {
				e.log.Error("the connection to NATS has ended for good: what other nodes and operators ask is not heard", "error", why)
			}
		}
		if conn, err = bus.Stay(c.NATSURL, "hmm-"+c.Node, nats.ClosedHandler(lost)); err != nil {
			return err
		}
		defer conn.Close()
		others, err := otherNodes(e.ctx, conn, c.Node, e.log)
		if err != nil {
			return err
		}
		if len(others) > 0 && c.PeerListen == "" {
			e.log.Warn("other nodes are on this NATS, and this HMM serves them nothing: requests that pass between nodes fail; start all with --peer-listen, as in --peer-listen :7400",
				"node", c.Node, "others", others)
		}
	}
	cfg := c.config()
	cfg.NATS, cfg.Peers = conn, peers
	if err := cfg.Validate(); err != nil {
		return fmt.Errorf("%w%w", errUsage, err)
	}
	d, err := hmm.New(cfg, e.log)
	if err != nil {
		return err
	}
	if c.Metrics != "" {
		r := prometheus.NewRegistry()
		obs.AddProcess(r)
		r.MustRegister(memoryMetrics{d.Stats})
		if _, err := obs.Serve(e.ctx, c.Metrics, r, func() bool { return true }, e.log); err != nil {
			return err
		}
	}
	return d.Serve(e.ctx)
}

// otherNodes are the names of the nodes whose HMMs answer; one that has this node's name is an error: what one has given out the other
// would be asked for, in vain. While NATS is away nobody can be asked, and an answer that cannot be read keeps no HMM from its work.
func otherNodes(ctx context.Context, nc *nats.Conn, node string, log *slog.Logger) (names []string, err error) {
	if !nc.IsConnected() {
		return nil, nil
	}
	others, err := nodes(ctx, nc)
	if err != nil && ctx.Err() == nil {
		log.Warn("not all other nodes on this NATS are known", "error", err)
		err = nil
	}
	for _, o := range others {
		if o.Node == node {
			return nil, fmt.Errorf("%wanother HMM on this NATS calls its node %s: give this one another name with --node", errUsage, node)
		}
		names = append(names, o.Node)
	}
	return names, err
}

// npuName is how operators see an NPU: node/index, node/host, or node/shared and the number of a memory domain.
func npuName(node string, npu int) string {
	switch {
	case npu == mem.HostNPU:
		return node + "/host"
	case npu < mem.HostNPU:
		return fmt.Sprintf("%s/shared%d", node, mem.HostNPU-npu-1)
	}
	return fmt.Sprintf("%s/%d", node, npu)
}

// nodeName is the host's name, with what a node id may not have replaced.
func nodeName() string {
	name, err := os.Hostname()
	if err != nil || name == "" {
		return "node"
	}
	return strings.Map(func(r rune) rune {
		if r == '-' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' {
			return r
		}
		return '-'
	}, name)
}
