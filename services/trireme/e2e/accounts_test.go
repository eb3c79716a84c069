package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
)

// node is an HMM process of its own, with a NATS to ask it over.
type node struct {
	binary, nats, socket, metrics string
	pid                           int
}

func startNode(t *testing.T, args ...string) *node {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "hmm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	n := &node{binary: path, nats: bustest.Run(t).URL(), socket: filepath.Join(dir, "s"), metrics: fmt.Sprintf("127.0.0.1:%d", freePort(t))}
	cmd := exec.Command(path, append([]string{"hmm", "--node", "n", "--nats-url", n.nats, "--socket", n.socket, "--metrics", n.metrics}, args...)...)
	var said syncBuffer
	cmd.Stderr = &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	n.pid = cmd.Process.Pid
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Errorf("the HMM: %v\n%s", err, said.String())
		}
	})
	return n
}

func (n *node) dial(t *testing.T, instance string, npus int) *hbm.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := hbm.Dial(ctx, n.socket, hbm.Hello{Instance: instance, Role: "decode", NPUs: npus})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func (n *node) status(t *testing.T, args ...string) []byte {
	t.Helper()
	return statusOf(t, n.binary, n.nats, "n/0", args...)
}

// files is what the kernel says that the HMM's memory files take, by name, and how many descriptors it has open.
func (n *node) files(t *testing.T) (bytes map[string]int64, open int) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", n.pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	bytes = map[string]int64{}
	for _, e := range entries {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		name, ok := strings.CutPrefix(to, "/memfd:")
		if err != nil || !ok {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, e.Name()), &st); err != nil {
			t.Fatal(err)
		}
		bytes[strings.TrimSuffix(name, " (deleted)")] = st.Blocks * 512
	}
	return bytes, len(entries)
}

// series reads /metrics: values by name with labels, as they stand there. It leaves no connection behind, which would be a descriptor of the HMM.
func (n *node) series(t *testing.T) map[string]float64 {
	t.Helper()
	once := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := once.Get("http://" + n.metrics + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	found := map[string]float64{}
	for s := bufio.NewScanner(resp.Body); s.Scan(); {
		if name, value, ok := strings.Cut(s.Text(), "} "); ok && strings.HasPrefix(name, "trireme_") {
			found[name+"}"], err = strconv.ParseFloat(value, 64)
		} else if name, value, ok := strings.Cut(s.Text(), " "); ok && strings.HasPrefix(name, "trireme_") {
			found[name], err = strconv.ParseFloat(value, 64)
		}
		if err != nil {
			t.Fatalf("%s: %v", s.Text(), err)
		}
	}
	return found
}

// consistent checks what holds for the figures of one moment, also under load.
func consistent(t *testing.T, s hbm.Stats) {
	t.Helper()
	booked := int64(0)
	for _, m := range slices.Concat(s.Memory, s.Shared) {
		sum := hbm.Usage{}
		for kind, u := range m.Kinds {
			sum.Used += u.Used
			sum.Padded += u.Padded
			sum.Cached += u.Cached
			if u.Used < 0 || u.Padded < 0 || u.Cached < 0 || u.Cached > u.Used+u.Padded || u.Peak < u.Used+u.Padded || u.Peak > m.Peak {
				t.Errorf("NPU %d, %s: %+v", m.NPU, kind, u)
			}
		}
		if sum.Used != m.Used || sum.Padded != m.Padded || sum.Cached != m.Cached || m.Free != m.Capacity-m.Used-m.Padded || m.Free < 0 {
			t.Errorf("NPU %d: %+v", m.NPU, m)
		}
		booked += m.Used + m.Padded
	}
	for _, x := range s.Spaces {
		booked -= x.Booked
	}
	if booked != 0 {
		t.Errorf("the NPUs' accounts have %d bytes more than the spaces: %+v", booked, s)
	}
}

// agree compares all that tells of the node's memory, while nobody uses it: the table, its JSON, the metrics, the kernel.
func (n *node) agree(t *testing.T) hbm.Stats {
	t.Helper()
	var all struct{ Nodes []hbm.Stats }
	if err := json.Unmarshal(n.status(t, "--json"), &all); err != nil || len(all.Nodes) != 1 {
		t.Fatalf("status --json: %v, %d nodes", err, len(all.Nodes))
	}
	s := all.Nodes[0]
	consistent(t, s)
	metrics, table := n.series(t), n.status(t)
	told := 0
	metric := func(want int64, format string, args ...any) {
		t.Helper()
		name := fmt.Sprintf("trireme_hmm_"+format, args...)
		if got, ok := metrics[name]; !ok || int64(got) != want {
			t.Errorf("%s is %v (%v), status says %d", name, got, ok, want)
		}
		told++
	}
	line := func(cells ...string) {
		t.Helper()
		for l := range bytes.Lines(table) {
			if slices.Equal(columns(string(l)), cells) {
				return
			}
		}
		t.Errorf("the table has no line %q:\n%s", cells, table)
	}
	size := func(n int64) string { return conf.Bytes(n).String() }
	for _, m := range slices.Concat(s.Memory, s.Shared) {
		npu := fmt.Sprintf("n/%d", m.NPU)
		switch m.NPU {
		case -1:
			npu = "n/host"
		case -2: // what the domain shares
			npu = "n/shared0"
		}
		instance := "-"
		if m.Instance != "" {
			instance = m.Instance
		}
		metric(m.Capacity, `memory_capacity_bytes{npu="%s"}`, npu)
		metric(m.Free, `memory_free_bytes{npu="%s"}`, npu)
		line(npu, "all", size(m.Used), size(m.Padded), size(m.Cached), size(m.Free), size(m.Peak), size(m.Capacity), instance)
		for kind, u := range m.Kinds {
			metric(u.Used, `memory_used_bytes{kind="%s",npu="%s"}`, kind, npu)
			metric(u.Padded, `memory_padded_bytes{kind="%s",npu="%s"}`, kind, npu)
			metric(u.Cached, `memory_cached_bytes{kind="%s",npu="%s"}`, kind, npu)
			metric(u.Peak, `memory_peak_bytes{kind="%s",npu="%s"}`, kind, npu)
			line(npu, kind, size(u.Used), size(u.Padded), size(u.Cached), "-", size(u.Peak), "-", "-")
		}
	}
	kernel, _ := n.files(t)
	for _, x := range s.Spaces {
		if got, ok := kernel[x.Name]; !ok || got != x.Booked+x.Kept || got != x.Resident {
			t.Errorf("the kernel says that %s takes %d bytes (%v), the HMM %+v", x.Name, got, ok, x)
		}
		metric(x.Booked, `space_booked_bytes{space="n/%s"}`, x.Name)
		metric(x.Kept, `space_kept_bytes{space="n/%s"}`, x.Name)
		metric(x.Unready, `space_unready_bytes{space="n/%s"}`, x.Name)
		metric(x.Resident, `space_resident_bytes{space="n/%s"}`, x.Name)
		line("n/"+x.Name, size(x.Booked), size(x.Kept), size(x.Unready), size(x.Resident))
	}
	for name, v := range map[string]int{"objects": s.Objects, "objects_resting": s.Resting, "holds": s.Holds, "requests": s.Requests,
		"requests_ended": s.Ended, "claims": s.Claims, "claims_orphaned": s.Orphans, "connections": s.Connections,
		"mm_cache_objects": s.CachedMM, "prefix_cache_blocks": s.CachedBlocks} {
		metric(int64(v), "%s", name)
	}
	for _, w := range s.Weights {
		label := fmt.Sprintf(`{domain="%d",set="%s"}`, w.Domain, w.Key[:16])
		metric(w.Bytes, "weights_bytes%s", label)
		metric(w.Loaded, "weights_loaded_bytes%s", label)
		metric(int64(w.Holders), "weights_holders%s", label)
		line("n/"+w.Key[:16], strconv.Itoa(w.Domain), strconv.Itoa(w.Objects), size(w.Bytes), size(w.Loaded), strconv.Itoa(w.Holders))
	}
	// And nothing but what was compared: figures of NPUs and kinds that status does not know.
	for name := range metrics {
		if strings.HasPrefix(name, "trireme_hmm_") && !strings.HasSuffix(name, "_total") {
			told--
		}
	}
	if told != 0 {
		t.Errorf("/metrics has %d figures more or less than status:\n%v", -told, metrics)
	}
	return s
}

// columns splits a line of a table at two and more blanks.
func columns(line string) (cells []string) {
	for _, c := range strings.Split(strings.TrimSpace(line), "  ") {
		if c = strings.TrimSpace(c); c != "" {
			cells = append(cells, c)
		}
	}
	return cells
}

// user does something with the HMM at a time; what it holds it keeps between two calls of do.
type user struct {
	c       *hbm.Client
	name    string
	r       *rand.Rand
	held    []*hbm.Object
	request int
}

func (u *user) ref() hbm.Ref {
	return hbm.Ref{Request: fmt.Sprint(u.name, u.request), Attempt: 1, Left: time.Minute}
}

func (u *user) do(ctx context.Context) error {
	switch u.r.IntN(10) {
	case 0, 1, 2, 3:
		kind := []mem.Kind{mem.KindKV, mem.KindLog, mem.KindSpec}[u.r.IntN(3)]
		spec := hbm.Spec{Kind: kind, NPU: []int{mem.HostNPU, 1, 2}[u.r.IntN(3)], Bytes: 1 + u.r.Int64N(400_000)}
		if u.r.IntN(3) == 0 {
			spec.Ref = u.ref()
		}
		o, err := u.c.Alloc(ctx, spec)
		if errors.Is(err, mem.ErrExhausted) || errors.Is(err, mem.ErrEnded) {
			return nil
		}
		u.held = append(u.held, o...)
		return err
	case 4: // to another NPU
		if len(u.held) == 0 {
			return nil
		}
		o, err := u.c.Attach(ctx, mem.ReadOnly, 1+u.r.IntN(2), u.held[u.r.IntN(len(u.held))].Handle())
		if errors.Is(err, mem.ErrExhausted) {
			return nil
		}
		u.held = append(u.held, o...)
		return err
	case 5:
		return u.cache(ctx)
	case 6:
		u.request++
		return u.c.End(ctx, fmt.Sprint(u.name, u.request-1))
	default:
		if len(u.held) == 0 {
			return nil
		}
		i := u.r.IntN(len(u.held))
		o := u.held[i]
		u.held = slices.Delete(u.held, i, i+1)
		return u.c.Free(ctx, o)
	}
}

// cache makes an MM object, unless it is in the cache, and lets it rest there.
func (u *user) cache(ctx context.Context) error {
	claim, err := u.c.Claim(ctx, hbm.Part{Request: u.ref().Request, Attempt: 1, Stage: "encode", Left: time.Minute}, "")
	if err != nil {
		return err
	}
	key := sha256.Sum256([]byte{byte(u.r.IntN(40))})
	_, ticket, err := u.c.FindMM(ctx, key, u.ref(), claim, 0)
	if err != nil || ticket == nil {
		return err
	}
	o, err := u.c.Alloc(ctx, hbm.Spec{Kind: mem.KindMM, NPU: 1 + u.r.IntN(2), Bytes: 1 + u.r.Int64N(200_000)})
	if err != nil {
		if errors.Is(err, mem.ErrExhausted) {
			err = nil
		}
		return errors.Join(err, u.c.AbandonMM(ctx, ticket))
	}
	if _, err := u.c.Seal(ctx, u.ref(), o...); err != nil {
		return err
	}
	return errors.Join(u.c.PublishMM(ctx, ticket, o[0]), u.c.Free(ctx, o...))
}

// TestAccountsAgree compares `status`, `status --json`, /metrics and the kernel's books of the HMM's files: at rest, in
// moments of a load, and after it.
func TestAccountsAgree(t *testing.T) {
	t.Parallel()
	n := startNode(t, "--npus", "3", "--npu-memory", "16MiB", "--host-memory", "8MiB", "--mm-cache", "1MiB", "--kv-cache", "1MiB")
	watcher := n.dial(t, "watcher", 1)
	_, open := n.files(t)
	rest := n.agree(t)
	if rest.Objects != 0 || rest.Memory[1].Instance != "watcher" {
		t.Errorf("at rest: %+v", rest)
	}

	var busy sync.RWMutex // read-held by users in a call, held by who looks at all
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var users sync.WaitGroup
	var clients []*hbm.Client
	for i := range 3 {
		c := n.dial(t, fmt.Sprint("user", i), 0)
		clients = append(clients, c)
		if _, err := c.OpenWeights(t.Context(), i%2, hbm.WeightSet{Key: hbm.Key{byte(i / 2)}, Sizes: []int64{100_000, 1}},
			func(context.Context, []int, [][]byte) error { return nil }, nil); err != nil {
			t.Fatal(err)
		}
		for j := range 3 {
			u := &user{c: c, name: fmt.Sprint("r", i, "-", j, "-"), r: rand.New(rand.NewPCG(uint64(i), uint64(j)))}
			users.Go(func() {
				for ctx.Err() == nil {
					busy.RLock()
					err := u.do(context.Background())
					busy.RUnlock()
					if err != nil {
						t.Error(err)
						return
					}
				}
				if err := errors.Join(u.c.Free(context.Background(), u.held...), u.c.End(context.Background(), u.ref().Request)); err != nil {
					t.Error(err)
				}
			})
		}
	}
	cached := int64(0)
	for range 3 {
		for range 50 {
			s, err := watcher.Stats(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			consistent(t, s)
		}
		busy.Lock()
		s := n.agree(t)
		busy.Unlock()
		if s.Objects == 0 || len(s.Weights) != 2 || s.Weights[0].Holders != 2 || s.Shared[0].Cached != 0 {
			t.Errorf("no load: %+v", s)
		}
		cached += s.Memory[2].Cached + s.Memory[3].Cached
	}
	if cached == 0 {
		t.Error("nothing was ever cached")
	}
	stop()
	users.Wait()
	for _, c := range clients {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	after := n.agree(t)
	if after.Objects != after.Resting || after.Holds != 0 || after.Claims != 0 || after.Requests != 0 || after.Connections != 1 {
		t.Errorf("after: %+v", after)
	}
	for _, m := range slices.Concat(after.Memory, after.Shared) {
		if m.Used+m.Padded != m.Cached || (m.Peak == 0) != (m.NPU == 0) {
			t.Errorf("after: NPU %d: %+v", m.NPU, m)
		}
	}
	// A connection's go when its client has been told that it has left. Not much later: what is only forgotten a collection of garbage closes, too.
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, now := n.files(t)
		if now == open {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the HMM has %d descriptors open, %d at rest", now, open)
		}
	}
}
