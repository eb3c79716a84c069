package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/wire"
)

// statusCmd shows what runs.
type statusCmd struct {
	NATSURL string `name:"nats-url" help:"NATS server of the system." default:"nats://127.0.0.1:4222"`
	JSON    bool   `name:"json" help:"Write one JSON object."`
	ackFlag
}

// Help is shown by `trireme status --help`.
func (statusCmd) Help() string {
	return `Tables and columns:
  RUNNING      requests in work at an instance
  KERNELS      what its NPUs compute with; cpu-…: the processor of its machine
  PENDING      messages that nobody has taken: while it grows, the stage has
               too few NPUs
  IN WORK      taken and not finished
  REDELIVERED  of these, those given out more than once, as after a kill
  MEMORY       NPUs; host is for pictures and long prompts, shared0 for the
               weights of all NPUs
  KIND         kv: keys and values; log: tokens of answers; mm: encoded
               pictures; pixels: pictures to encode
  USED         content; PADDED: lost to whole pages
  CACHED       of both, what is given up when somebody needs the room
  PEAK         most of both so far
  SPACE        files of memory. BOOKED: USED and PADDED of all; KEPT: freed or
               taken ahead; UNREADY: still to be taken ahead (--ready-memory);
               RESIDENT: what the system says that the file takes
  HOLDERS      processes that use a set of weights

What instances say of themselves is up to a second old, so that just after a change the first table may show the NPUs from before.

Examples:
  trireme status
  trireme status --json | jq '.queues[] | {stage, pending, in_work}'
  trireme status --nats-url nats://127.0.0.1:14222`
}

// status is what `status --json` writes.
type status struct {
	Instances []wire.Instance `json:"instances"`
	Queues    []bus.Queue     `json:"queues"`
	Dead      int             `json:"dead_letters"`
	NPUs      []npuStatus     `json:"npus"` // of all nodes
	Nodes     []hbm.Stats     `json:"nodes"`
}

// npuStatus is who has an NPU. Without Instance it is spare, or kept for a while for an instance that may come back.
type npuStatus struct {
	NPU      string `json:"npu"`                // node/index
	Instance string `json:"instance,omitempty"` // id
	Name     string `json:"name,omitempty"`     // the instance's stable name
	Reserved string `json:"reserved,omitempty"` // name of the instance that it is kept for
}

// npusOf lists the NPUs of nodes.
func npusOf(nodes []hbm.Stats) []npuStatus {
	all := []npuStatus{}
	for _, n := range nodes {
		for _, m := range n.Memory {
			if m.NPU >= 0 {
				all = append(all, npuStatus{NPU: npuName(n.Node, m.NPU), Instance: m.Instance, Name: m.Name, Reserved: m.Reserved})
			}
		}
	}
	return all
}

// Run reads and prints the status.
func (c *statusCmd) Run(e *env) error {
	s, err := readStatus(e.ctx, c.NATSURL, c.AckWait)
	if err != nil {
		return err
	}
	if c.JSON {
		enc := json.NewEncoder(e.out)
		enc.SetIndent("", "  ")
		return enc.Encode(s)
	}
	return s.print(e.out)
}

func readStatus(ctx context.Context, url string, ackWait time.Duration) (*status, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	b, err := look(ctx, url, "status", ackFlag{AckWait: ackWait})
	if err != nil {
		return nil, err
	}
	defer b.Close()
	var s status
	view, err := b.Instances(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading heartbeats: %w", err)
	}
	s.Instances = view.All()
	order := []string{"gateway", "encode", "prefill", "decode"}
	at := func(i wire.Instance) int { return slices.Index(order, wire.Roles(i.Role)[0]) }
	slices.SortFunc(s.Instances, func(a, b wire.Instance) int {
		return cmp.Or(at(a)-at(b), strings.Compare(a.Role, b.Role), strings.Compare(a.ID, b.ID))
	})
	if s.Queues, err = b.Queues(ctx); err != nil {
		return nil, err
	}
	if s.Dead, err = b.DeadCount(ctx); err != nil {
		return nil, err
	}
	s.Nodes, err = nodes(ctx, b.Conn())
	s.NPUs = npusOf(s.Nodes)
	return &s, err
}

// nodes asks every HMM; those that answer within a short while of the first count. With an error are those whose answers could be read.
func nodes(ctx context.Context, nc *nats.Conn) ([]hbm.Stats, error) {
	found := []hbm.Stats{}
	inbox := nc.NewRespInbox()
	sub, err := nc.SubscribeSync(inbox)
	if err != nil {
		return nil, fmt.Errorf("asking the HMMs: %w", err)
	}
	defer sub.Unsubscribe()
	if err := nc.PublishRequest(wire.SubjectHMM, inbox, nil); err != nil {
		return nil, fmt.Errorf("asking the HMMs: %w", err)
	}
	for wait := time.Second; ; wait = 100 * time.Millisecond {
		brief, cancel := context.WithTimeout(ctx, wait)
		msg, none := sub.NextMsgWithContext(brief)
		cancel()
		if none != nil || len(msg.Data) == 0 { // no more, or no responders at all
			break
		}
		var s hbm.Stats
		if why := json.Unmarshal(msg.Data, &s); why != nil {
			err = fmt.Errorf("reading an HMM's answer: %w", why)
			continue
		}
		found = append(found, s)
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		err = fmt.Errorf("asking the HMMs: %w", context.Cause(ctx))
	}
	slices.SortFunc(found, func(a, b hbm.Stats) int { return strings.Compare(a.Node, b.Node) })
	return found, err
}

// print writes the status as tables.
func (s *status) print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "ROLE\tINSTANCE\tNPUS\tSTATE\tRUNNING\tPID\tKERNELS")
	var paced []string
	for _, i := range s.Instances {
		var npus []string
		for _, n := range i.NPUs {
			npus = append(npus, npuName(i.Node, n))
		}
		state := "starting"
		switch {
		case i.Ready && i.Standby:
			state = "standby"
		case i.Ready:
			state = "ready"
		}
		if i.Paced != "" {
			paced = append(paced, fmt.Sprintf("%s as %s", i.ID, i.Paced))
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%d\t%s\n", i.Role, i.ID, dash(strings.Join(npus, " ")), state, i.Running, i.PID, dash(i.Kernels))
	}
	if s.waits() {
		fmt.Fprintln(t, "\nWAITING\tCLASS\tREQUESTS")
		for _, i := range s.Instances {
			for _, class := range slices.Sorted(maps.Keys(i.Waiting)) {
				fmt.Fprintf(t, "%s\t%s\t%d\n", i.ID, class, i.Waiting[class])
			}
		}
	}
	fmt.Fprintln(t, "\nQUEUE\tSTREAM\tPENDING\tIN WORK\tREDELIVERED\tOLDEST")
	for _, q := range s.Queues {
		oldest := "-"
		if q.Oldest > 0 {
			oldest = q.Oldest.Round(time.Millisecond).String()
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%d\t%s\n", q.Stage, q.Stream, q.Pending, q.InWork, q.Redelivered, oldest)
	}
	if s.Dead > 0 {
		fmt.Fprintf(t, "\ndead letters: %d, see trireme dead list\n", s.Dead)
	}
	fmt.Fprintln(t, "\nNPU\tINSTANCE\tNAME")
	for _, n := range s.NPUs {
		owner, name := n.Instance, n.Name
		switch {
		case n.Reserved != "":
			owner, name = "reserved", n.Reserved
		case owner == "":
			owner = "spare"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", n.NPU, owner, dash(name))
	}
	fmt.Fprintln(t, "\nMEMORY\tKIND\tUSED\tPADDED\tCACHED\tFREE\tPEAK\tCAPACITY\tINSTANCE")
	for _, n := range s.Nodes {
		for _, m := range slices.Concat(n.Memory, n.Shared) {
			printMemory(t, npuName(n.Node, m.NPU), m)
		}
	}
	fmt.Fprintln(t, "\nSPACE\tBOOKED\tKEPT\tUNREADY\tRESIDENT")
	for _, n := range s.Nodes {
		for _, x := range n.Spaces {
			fmt.Fprintf(t, "%s/%s\t%v\t%v\t%v\t%v\n", n.Node, x.Name, conf.Bytes(x.Booked), conf.Bytes(x.Kept), conf.Bytes(x.Unready), conf.Bytes(x.Resident))
		}
	}
	fmt.Fprintln(t, "\nWEIGHTS\tDOMAIN\tOBJECTS\tBYTES\tLOADED\tHOLDERS")
	for _, n := range s.Nodes {
		for _, x := range n.Weights {
			fmt.Fprintf(t, "%s/%s\t%d\t%d\t%v\t%v\t%d\n", n.Node, setName(x), x.Domain, x.Objects, conf.Bytes(x.Bytes),
				conf.Bytes(x.Loaded), x.Holders)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if len(paced) > 0 {
		fmt.Fprintf(w, "\npaced NPUs (slowed down to a profile): %s\n", strings.Join(paced, ", "))
	}
	if len(s.Nodes) == 0 {
		return errors.New("no HMM answers")
	}
	return nil
}

// waits reports whether requests wait for capacity at any gateway.
func (s *status) waits() bool {
	return slices.ContainsFunc(s.Instances, func(i wire.Instance) bool { return len(i.Waiting) > 0 })
}

// printMemory writes the lines of one NPU: all kinds together, then those of which there is or was any.
func printMemory(w io.Writer, name string, m hbm.NPUStats) {
	line := func(kind, free, capacity string, u hbm.Usage, instance string) {
		fmt.Fprintf(w, "%s\t%s\t%v\t%v\t%v\t%s\t%v\t%s\t%s\n", name, kind, conf.Bytes(u.Used), conf.Bytes(u.Padded),
			conf.Bytes(u.Cached), free, conf.Bytes(u.Peak), capacity, dash(instance))
	}
	line("all", conf.Bytes(m.Free).String(), conf.Bytes(m.Capacity).String(), m.Usage, m.Instance)
	for _, kind := range slices.Sorted(maps.Keys(m.Kinds)) {
		line(kind, "-", "-", m.Kinds[kind], "")
	}
}

// setName is how operators see a weight set: the beginning of its key.
func setName(w hbm.WeightsStats) string { return w.Key[:min(16, len(w.Key))] }

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
