package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"

	"trireme.dev/services/trireme/supervise"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/transfer/transfertest"
)

// Two nodes on this machine: two HMMs, each with a socket of its own, which know of each other by NATS alone, or by what
// peer says of node a. Gateway, encoder and prefill are on node a, the decoder is on node b.
type nodes struct {
	*cluster          // the gateway and node a's HMM
	b        *cluster // node b's HMM
}

// startNodes runs the services of two nodes under a supervisor for the length of the test. proxy, if not nil, is given the
// address where node a serves, and returns the one that node b is to use. secure: the nodes speak TLS.
func startNodes(t *testing.T, proxy func(addr string) string, secure bool) *nodes {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	log := &syncBuffer{}
	s := supervise.New(log, func(x supervise.Exit) { fmt.Fprintf(log, "%s ended: %s\n", x.Child.Name, x.How) })
	nats := bustest.Run(t).URL()
	n := &nodes{cluster: &cluster{url: fmt.Sprintf("http://127.0.0.1:%d", freePort(t))}, b: &cluster{}}
	var names []string
	run := func(name string, args ...string) {
		names = append([]string{name}, names...)
		s.Start(supervise.Child{Name: name, Path: path, Args: append(args, "--nats-url", nats)})
	}
	t.Cleanup(func() {
		for _, name := range names {
			if err := s.Stop(10*time.Second, name); err != nil {
				t.Errorf("stopping %s: %v", name, err)
			}
		}
		if t.Failed() {
			t.Logf("output of the services:\n%s", log)
		}
	})
	stage := map[*cluster][]string{}
	serves := map[string]string{}
	for name, c := range map[string]*cluster{"a": n.cluster, "b": n.b} {
		if c.data, err = os.MkdirTemp("", "node"); err != nil { // short: a socket's path has 107 bytes
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(c.data) })
		serves[name] = fmt.Sprintf("127.0.0.1:%d", freePort(t))
		stage[c] = []string{"--hmm", filepath.Join(c.data, "hmm.sock"), "--data", c.data, "--model", root + "/models/shapes-vl-moe"}
	}
	certificates := t.TempDir()
	if secure {
		ca, key := transfertest.Issue(t, certificates, "ca", nil, nil)
		transfertest.Issue(t, certificates, "a", ca, key)
		transfertest.Issue(t, certificates, "b", ca, key)
	}
	for name, c := range map[string]*cluster{"a": n.cluster, "b": n.b} {
		args := []string{"hmm", "--node", name, "--socket", filepath.Join(c.data, "hmm.sock"), "--peer-listen", serves[name],
			"--npus", "2", "--npu-memory", "256MiB", "--host-memory", "128MiB"}
		if proxy != nil && name == "b" {
			args = append(args, "--peer", "a="+proxy(serves["a"]))
		}
		if secure {
			file := func(name string) string { return filepath.Join(certificates, name) }
			args = append(args, "--peer-cert", file(name+".crt"), "--peer-key", file(name+".key"), "--peer-ca", file("ca.crt"))
		}
		run("hmm-"+name, args...)
	}
	run("encoder", append([]string{"encoder"}, stage[n.cluster]...)...)
	run("prefill", append([]string{"prefill"}, stage[n.cluster]...)...)
	run("decoder", append([]string{"decoder"}, stage[n.b]...)...)
	run("gateway", append([]string{"gateway", "--http", strings.TrimPrefix(n.url, "http://"), "--served-name", "shapes-vl-moe"}, stage[n.cluster]...)...)
	n.waitReady(t)
	return n
}

// kill ends the process of a service of the node whose data folder it names in its arguments; it is started again.
func (n *nodes) kill(tb testing.TB, role string, at *cluster) {
	tb.Helper()
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		args := strings.Split(string(line), "\x00")
		if len(fields) > 1 && fields[1] == strconv.Itoa(os.Getpid()) && len(args) > 1 && args[1] == role &&
			strings.Contains(string(line), at.data) {
			kill(tb, pid)
			return
		}
	}
	tb.Errorf("no process runs %s", role)
}

// gone waits until nothing is left on either node.
func (n *nodes) gone(tb testing.TB) {
	tb.Helper()
	n.expectNoMemory(tb)
	n.b.expectNoMemory(tb)
}

// Encoder and prefill on one node, the decoder on another: answers are the reference's, pictures and all, and whoever is
// killed, HMMs included, the client sees one undisturbed answer.
func TestTwoNodes(t *testing.T) {
	t.Parallel()
	n := startNodes(t, nil, false)
	t.Run("goldens", func(t *testing.T) {
		var wg sync.WaitGroup
		for _, g := range loadGoldens(t) {
			p := g.params(t)
			p.MaxTokens = openai.Int(320)
			wg.Go(func() {
				s, err := n.stream(t.Context(), p, nil)
				if err != nil || s.text != g.Output || s.usage.CompletionTokens != int64(len(g.OutputIDs)) {
					t.Errorf("%s: %q, %v; want %q", g.Name, s.text, err, g.Output)
				}
			})
		}
		wg.Wait()
		n.gone(t)
	})
	p := mixed(t, 4) // four pictures
	p.MaxTokens = openai.Int(400)
	p.SetExtraFields(map[string]any{"ignore_eos": true})
	want, err := n.stream(t.Context(), p, nil)
	if err != nil {
		t.Fatal(err)
	}
	n.during(t, p, func() {
		n.b.expectMemory(t, "the sequence's KV", func(s hbm.Stats) bool { return s.Memory[1].Kinds["kv"].Used > 0 })
	})
	n.gone(t)
	for name, x := range map[string]struct {
		role string
		at   *cluster
	}{"decoder": {"decoder", n.b}, "HMM of the decoder": {"hmm", n.b}, "HMM of prefill": {"hmm", n.cluster}} {
		t.Run(name+" killed", func(t *testing.T) {
			n.waitReady(t)
			before := n.metric(t, "trireme_prefill_computed_tokens_total")
			got, err := n.stream(t.Context(), p, func(i int) {
				if i == 30 {
					n.kill(t, x.role, x.at)
				}
			})
			if err != nil || got.text != want.text || got.usage.TotalTokens != want.usage.TotalTokens {
				t.Errorf("after the kill %q, %v; undisturbed %q", got.text, err, want.text)
			}
			computed := n.metric(t, "trireme_prefill_computed_tokens_total") - before
			if fresh := int(got.usage.PromptTokens - got.usage.PromptTokensDetails.CachedTokens); name == "decoder" && computed != fresh {
				t.Errorf("%d prompt tokens were computed, want %d", computed, fresh)
			}
		})
	}
	n.waitReady(t)
	n.gone(t)
}

// A link that is cut in the middle of a transfer, and comes back: the rest is pulled, over TLS, and nobody sees it.
func TestLinkBetweenNodesIsCut(t *testing.T) {
	t.Parallel()
	c := &cut{t: t, at: 300 << 10}
	n := startNodes(t, c.proxy, true)
	var g goldenCase
	for _, x := range loadGoldens(t) {
		if len(x.Images) == 10 {
			g = x
		}
	}
	p := g.params(t)
	p.MaxTokens = openai.Int(320)
	s, err := n.stream(t.Context(), p, nil)
	if err != nil || s.text != g.Output {
		t.Errorf("%q, %v; want %q", s.text, err, g.Output)
	}
	c.mu.Lock()
	if c.cuts != 1 || c.after == 0 {
		t.Errorf("%d cuts, %d connections after them: the test has cut nothing", c.cuts, c.after)
	}
	t.Logf("cut after %d KiB, %d bytes went over in all", c.at>>10, c.sent)
	c.mu.Unlock()
	if got := n.metric(t, "trireme_prefill_computed_tokens_total"); got != len(g.InputIDs) {
		t.Errorf("%d prompt tokens were computed for a prompt of %d", got, len(g.InputIDs))
	}
	n.gone(t)
}

// cut is a proxy that ends all connections when the first at bytes have passed, and refuses new ones for a while.
type cut struct {
	t  *testing.T
	at int64

	mu    sync.Mutex
	sent  int64
	cuts  int
	after int // connections since
	until time.Time
	open  []net.Conn
}

func (c *cut) proxy(addr string) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		c.t.Fatal(err)
	}
	var wg sync.WaitGroup
	c.t.Cleanup(func() {
		l.Close()
		c.mu.Lock()
		for _, conn := range c.open {
			conn.Close()
		}
		c.mu.Unlock()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", addr)
			c.mu.Lock()
			if err != nil || time.Now().Before(c.until) {
				in.Close()
				if out != nil {
					out.Close()
				}
				c.mu.Unlock()
				continue
			}
			if c.cuts > 0 {
				c.after++
			}
			c.open = append(c.open, in, out)
			c.mu.Unlock()
			wg.Go(func() { io.Copy(out, in); out.Close() })
			wg.Go(func() { io.Copy(c.counted(in), out); in.Close() })
		}
	})
	return l.Addr().String()
}

// counted is w, where what passes is counted.
func (c *cut) counted(w io.Writer) io.Writer {
	return writerFunc(func(p []byte) (int, error) {
		c.mu.Lock()
		c.sent += int64(len(p))
		if c.cuts == 0 && c.sent >= c.at {
			c.cuts++
			c.until = time.Now().Add(500 * time.Millisecond)
			for _, conn := range c.open {
				conn.Close()
			}
			c.open = nil
		}
		c.mu.Unlock()
		return w.Write(p)
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
