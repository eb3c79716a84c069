package transfer_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/transfer"
)

// Two network namespaces as two nodes. Each node is this test binary, started again in its namespace: see TestMain.
// Run with: go test -run xxx -bench Nodes -benchtime 1x ./shared/transfer (root, ip, tc and iperf3 needed).

const (
	addressA, addressB = "10.99.0.1", "10.99.0.2"
	roleVariable       = "TRIREME_TRANSFER_NODE" // serve BYTES, or pull BYTES STALL MEMORY CRC; MEMORY: used or fresh
)

type pulled struct {
	Seconds float64
	Stats   transfer.ClientStats
}

// node is what the process in a namespace does; its error is the process's.
func node(role []string) error {
	n, err := strconv.Atoi(role[1])
	if err != nil {
		return err
	}
	p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return err
	}
	h := mem.Handle{Node: "n1", Bytes: int64(n)}
	if role[0] == "serve" {
		for i := range p {
			p[i] = byte(i ^ i>>9 ^ i>>17)
		}
		s, err := transfer.NewServer(transfer.ServerConfig{Source: fixed{p}, Stall: 30 * time.Second})
		if err != nil {
			return err
		}
		l, err := net.Listen("tcp", addressA+":7000")
		if err != nil {
			return err
		}
		fmt.Println(mem.Checksum(p))
		return s.Serve(context.Background(), l) // until killed
	}
	stall, err := time.ParseDuration(role[2])
	if err != nil {
		return err
	}
	if role[3] == "used" { // as most that an HMM gives out, which keeps what is given back
		for i := range p {
			p[i] = 1
		}
	}
	crc, err := strconv.ParseUint(role[4], 10, 32)
	if err != nil {
		return err
	}
	h.Sealed, h.CRC = true, uint32(crc)
	c, err := transfer.NewClient(transfer.ClientConfig{
		Address: func(context.Context, string) (string, error) { return addressA + ":7000", nil }, Stall: stall, Retries: 30,
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	start, began := time.Now(), false
	err = c.Pull(ctx, h, p, func(done int64) {
		if !began && done > h.Bytes/4 {
			began = true
			fmt.Println("quarter")
		}
	})
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(pulled{time.Since(start).Seconds(), c.Stats()})
}

// nodes are two namespaces, taken down with the benchmark.
type nodes struct {
	b    *testing.B
	a, z string
}

func newNodes(b *testing.B) *nodes {
	b.Helper()
	if os.Geteuid() != 0 {
		b.Skip("SKIPPED: network namespaces need root")
	}
	for _, tool := range []string{"ip", "tc", "iperf3"} {
		if _, err := exec.LookPath(tool); err != nil {
			b.Skipf("SKIPPED: %v", err)
		}
	}
	id := fmt.Sprintf("tt%d", os.Getpid())
	n := &nodes{b, id + "a", id + "z"}
	for _, ns := range []string{n.a, n.z} {
		b.Cleanup(func() { _ = exec.Command("ip", "netns", "del", ns).Run() })
		if out, err := exec.Command("ip", "netns", "add", ns).CombinedOutput(); err != nil {
			b.Skipf("SKIPPED: no network namespaces here: %v: %s", err, out)
		}
	}
	return n
}

func (n *nodes) sh(format string, args ...any) string {
	n.b.Helper()
	line := strings.Fields(fmt.Sprintf(format, args...))
	ctx, cancel := context.WithTimeout(n.b.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, line[0], line[1:]...).CombinedOutput()
	if err != nil {
		n.b.Fatalf("%v: %v: %s", line, err, out)
	}
	return string(out)
}

// link joins the nodes by a veth pair, both directions limited to rate unless that is empty.
func (n *nodes) link(rate string) {
	n.sh("ip link add eth9 netns %s type veth peer name eth9 netns %s", n.a, n.z)
	for ns, addr := range map[string]string{n.a: addressA, n.z: addressB} {
		n.sh("ip -n %s addr add %s/24 dev eth9", ns, addr)
		n.sh("ip -n %s link set eth9 up", ns)
		if rate != "" {
			n.sh("ip netns exec %s tc qdisc add dev eth9 root tbf rate %s burst 2mb latency 20ms", ns, rate)
		}
	}
}

// start runs a command in a namespace until the benchmark ends; lines are what it prints.
func (n *nodes) start(ns, role string, command ...string) (lines chan string) {
	n.b.Helper()
	cmd := exec.Command("ip", append([]string{"netns", "exec", ns}, command...)...)
	cmd.Env = append(os.Environ(), roleVariable+"="+role)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		n.b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		n.b.Fatal(err)
	}
	lines = make(chan string, 16)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer close(lines)
		d := make([]byte, 4096)
		rest := ""
		for {
			k, err := out.Read(d)
			all := strings.Split(rest+string(d[:k]), "\n")
			for _, l := range all[:len(all)-1] {
				select {
				case lines <- l:
				default: // iperf3 says much that nobody reads
				}
			}
			rest = all[len(all)-1]
			if err != nil {
				return
			}
		}
	}()
	n.b.Cleanup(func() { _ = cmd.Process.Kill(); <-ended; _ = cmd.Wait() })
	return lines
}

func (n *nodes) line(lines chan string) string {
	n.b.Helper()
	l, ok := <-lines
	if !ok {
		n.b.Fatal("the process in the namespace ended")
	}
	return l
}

// pull pulls an object of so many bytes from a to z, into used memory or fresh; atQuarter, if not nil, is called when a quarter
// of it is there.
func (n *nodes) pull(bytes int, stall time.Duration, memory string, atQuarter func()) pulled {
	n.b.Helper()
	crc := n.line(n.start(n.a, fmt.Sprintf("serve %d", bytes), os.Args[0]))
	lines := n.start(n.z, fmt.Sprintf("pull %d %v %s %s", bytes, stall, memory, crc), os.Args[0])
	n.line(lines)
	if atQuarter != nil {
		atQuarter()
	}
	var r pulled
	if err := json.Unmarshal([]byte(n.line(lines)), &r); err != nil {
		n.b.Fatal(err)
	}
	if r.Stats.Bytes != int64(bytes) {
		n.b.Fatalf("%+v, want %d bytes once each", r, bytes)
	}
	return r
}

// iperf measures bytes a second from a to z over 4 connections, as many as a pull has.
func (n *nodes) iperf(seconds int) float64 {
	n.b.Helper()
	n.start(n.a, "", "iperf3", "-s", "-1", "-B", addressA)
	for range 100 { // until it listens
		if strings.Contains(n.sh("ip netns exec %s ss -ltn", n.a), ":5201") {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	var result struct {
		End struct {
			SumReceived struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		}
	}
	out := n.sh("ip netns exec %s iperf3 -c %s -R -P 4 -t %d -J", n.z, addressA, seconds)
	if err := json.Unmarshal([]byte(out), &result); err != nil {
		n.b.Fatal(err)
	}
	return result.End.SumReceived.BitsPerSecond / 8
}

func (n *nodes) report(bytes int, r pulled, iperf float64) {
	got := float64(bytes) / r.Seconds
	n.b.ReportMetric(got/1e9, "GB/s")
	n.b.ReportMetric(iperf/1e9, "iperf3-GB/s")
	n.b.ReportMetric(100*got/iperf, "%ofiperf3")
	n.b.ReportMetric(float64(r.Stats.Wasted)/1e6, "wasted-MB")
	n.b.ReportMetric(float64(r.Stats.Failures), "failures")
	n.b.ReportMetric(0, "ns/op")
}

// size is how many bytes a benchmark pulls, and for how many seconds iperf3 is run beside: less with -short, for a run that
// shows only that it works.
func size(bytes, seconds int) (int, int) {
	if testing.Short() {
		return bytes / 8, 1
	}
	return bytes, seconds
}

func BenchmarkNodes(b *testing.B) {
	for _, tc := range []struct {
		rate, memory string
		bytes        int
	}{{"1gbit", "used", 384 * mib}, {"5gbit", "used", 1536 * mib}, {"5gbit", "fresh", 1536 * mib}, {"", "used", 1536 * mib}} {
		b.Run("rate="+tc.rate+"/"+tc.memory, func(b *testing.B) {
			for range b.N {
				n := newNodes(b)
				n.link(tc.rate)
				bytes, seconds := size(tc.bytes, 3)
				iperf := n.iperf(seconds)
				n.report(bytes, n.pull(bytes, 10*time.Second, tc.memory, nil), iperf)
			}
		})
	}
}

// BenchmarkNodesCut takes the link away for 3 s in the middle: the taker notices after a second, and goes on when it is back.
func BenchmarkNodesCut(b *testing.B) {
	for range b.N {
		n := newNodes(b)
		n.link("1gbit")
		const bytes = 384 * mib
		r := n.pull(bytes, time.Second, "used", func() {
			n.sh("ip -n %s link set eth9 down", n.a)
			time.Sleep(3 * time.Second)
			n.sh("ip -n %s link set eth9 up", n.a)
		})
		if r.Stats.Failures == 0 || r.Stats.Wasted > 4*mib {
			b.Errorf("%+v: the cut went unnoticed, or more was wasted than a frame of each connection", r)
		}
		b.ReportMetric(r.Seconds, "s")
		b.ReportMetric(float64(r.Stats.Wasted)/1e6, "wasted-MB")
		b.ReportMetric(float64(r.Stats.Failures), "failures")
	}
}

// BenchmarkNodesFar has a way of 20 ms there and back, and loss.
func BenchmarkNodesFar(b *testing.B) {
	for _, loss := range []float64{0, 0.001} {
		b.Run(fmt.Sprintf("loss=%v", loss), func(b *testing.B) {
			for range b.N {
				n := newNodes(b)
				n.far(10*time.Millisecond, loss)
				bytes, seconds := size(192*mib, 4)
				iperf := n.iperf(seconds)
				n.report(bytes, n.pull(bytes, 10*time.Second, "used", nil), iperf)
			}
		})
	}
}
