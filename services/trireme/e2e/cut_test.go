package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"trireme.dev/services/trireme/supervise"
	"trireme.dev/shared/bus/bustest"
)

// A service is cut off from NATS, and from nothing else, while 16 clients stream: it runs in a network namespace of its own, and
// somebody pulls the cable. Short cuts of two services are always tested; those of each service for 30 s, with all times as they
// are in real life, with TRIREME_CHAOS set (see there).

// cutOff is a fleet of which one service can be cut off.
type cutOff struct {
	*cluster
	t    *testing.T
	hub  string // namespace of NATS and of all services but one
	spur string // of that one
}

// cutFleet starts two encoders, two prefills and two decoders, gateway, HMM and NATS; the one that cut names, of two the second,
// is alone on the spur. ping is embedded.Options.Ping; with is added to the services' environment.
func cutFleet(t *testing.T, cut string, ping time.Duration, with ...string) *cutOff {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: services that are cut off from NATS; it takes network namespaces, and so root")
	}
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	id := fmt.Sprintf("cut%d%s", os.Getpid(), cut[:1])
	f := &cutOff{t: t, hub: id + "h", spur: id + "s"}
	for _, ns := range []string{f.hub, f.spur} {
		if out, err := exec.Command("ip", "netns", "add", ns).CombinedOutput(); err != nil {
			t.Skipf("NOT TESTED: services that are cut off from NATS; no network namespaces here: %v: %s", err, out)
		}
		t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", ns).Run() })
		f.ip("-n", ns, "link", "set", "lo", "up")
	}
	f.ip("link", "add", "cable", "netns", f.hub, "type", "veth", "peer", "name", "cable", "netns", f.spur)
	for ns, addr := range map[string]string{f.hub: "10.77.0.1/24", f.spur: "10.77.0.2/24"} {
		f.ip("-n", ns, "addr", "add", addr, "dev", "cable")
		f.ip("-n", ns, "link", "set", "cable", "up")
	}
	nats := bustest.LaunchProcess(t, bustest.Launch{By: f.in(f.hub), Host: "0.0.0.0", Ping: ping})

	log := &syncBuffer{}
	s := supervise.New(log, func(x supervise.Exit) { fmt.Fprintf(log, "%s ended: %s\n", x.Child.Name, x.How) })
	data, err := os.MkdirTemp("", "cut") // short: a socket's path has 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(data) })
	var names []string
	t.Cleanup(func() {
		for i := len(names) - 1; i >= 0; i-- {
			if err := s.Stop(20*time.Second, names[i]); err != nil {
				t.Errorf("stopping %s: %v", names[i], err)
			}
		}
		if t.Failed() {
			t.Logf("output of the services:\n%s", log)
		}
	})
	socket, at := filepath.Join(data, "hmm.sock"), f.hub
	run := func(name, service string, args ...string) {
		ns, host := f.hub, "127.0.0.1"
		if name == cut {
			ns, host = f.spur, "10.77.0.1"
		}
		if service == "gateway" {
			at = ns
		}
		command := append(f.in(ns), path, service, "--nats-url", fmt.Sprintf("nats://%s:%d", host, nats.Port()))
		names = append(names, name)
		s.Start(supervise.Child{Name: name, Path: "ip", Args: append(command[1:], args...), Env: append(os.Environ(), with...)})
	}
	run("hmm", "hmm", "--socket", socket, "--npus", "6", "--npu-memory", "256MiB", "--host-memory", "128MiB")
	stage := []string{"--hmm", socket, "--data", data, "--model", root + "/models/shapes-vl-moe", "--threads", "1"}
	for _, service := range []string{"encoder", "prefill", "decoder"} {
		run(service+"-0", service, stage...)
		run(service, service, stage...)
	}
	run("gateway", "gateway", "--http", "127.0.0.1:8080", "--served-name", "shapes-vl-moe", "--hmm", socket, "--data", data,
		"--model", root+"/models/shapes-vl-moe")
	f.cluster = &cluster{data: data, log: log, url: "http://" + forward(t, at, "127.0.0.1:8080")}
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	f.waitReady(t)
	return f
}

func (f *cutOff) in(ns string) []string { return []string{"ip", "netns", "exec", ns} }

func (f *cutOff) ip(args ...string) {
	f.t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		f.t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// cable pulls the cable, or puts it back.
func (f *cutOff) cable(state string) { f.ip("-n", f.hub, "link", "set", "cable", state) }

// forward brings connections to an address of a namespace.
func forward(t *testing.T, ns, addr string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	dial := dialer(t, ns)
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer in.Close()
				out, err := dial(addr)
				if err != nil {
					return // the client sees its connection end
				}
				defer out.Close()
				wg.Go(func() { _, _ = io.Copy(out, in); _ = out.(*net.TCPConn).CloseWrite() })
				_, _ = io.Copy(in, out)
			})
		}
	})
	return l.Addr().String()
}

// dialer returns what connects from a network namespace. A thread of its own is there, for as long as the process lives: the
// death of a thread is the death of the processes that it has started (PR_SET_PDEATHSIG), which may be anybody's.
func dialer(t *testing.T, ns string) func(addr string) (net.Conn, error) {
	t.Helper()
	file, err := os.Open("/run/netns/" + ns)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	there, calls := make(chan error), make(chan func())
	go func() {
		runtime.LockOSThread()
		there <- unix.Setns(int(file.Fd()), unix.CLONE_NEWNET)
		for f := range calls {
			f()
		}
	}()
	if err := <-there; err != nil {
		t.Fatal(err)
	}
	return func(addr string) (conn net.Conn, err error) {
		done := make(chan struct{})
		calls <- func() {
			conn, err = net.DialTimeout("tcp", addr, 10*time.Second)
			close(done)
		}
		<-done
		return conn, err
	}
}

// cut is the test: nothing is lost or changed by a cut of so long, and all is free afterwards.
func (f *cutOff) cut(d time.Duration) {
	t := f.t
	t.Helper()
	l := newLoad(t, f.cluster)
	l.begin()
	time.Sleep(500 * time.Millisecond) // into the middle of the load
	middle := time.Now().Add(d / 2)
	f.cable("down")
	time.Sleep(d)
	f.cable("up")
	l.waitOpen(t)
	l.end(t)
	l.report(t, fmt.Sprintf("cuts of %v", d), []time.Time{middle})
	f.waitReady(t)
	f.expectWithin(t, time.Minute, "nothing but what the caches keep", nothing)
}

func TestCutOff(t *testing.T) {
	t.Parallel()
	_, full := disturbances(t, 0, 1)
	for _, x := range []struct {
		service string
		short   time.Duration // 0: only in the full form
	}{{"decoder", 4 * time.Second}, {"gateway", 9 * time.Second}, {"encoder", 0}, {"prefill", 0}, {"hmm", 0}} {
		t.Run(x.service, func(t *testing.T) {
			switch {
			case full:
				t.Parallel()
				cutFleet(t, x.service, 0).cut(30 * time.Second)
			case x.short > 0:
				t.Parallel()
				// NATS notices after 1.5 s, messages come again after 2 s, and stages give a gateway up 2 s after its heartbeat is gone.
				cutFleet(t, x.service, 500*time.Millisecond, "TRIREME_ACK_WAIT=2s", "TRIREME_GATEWAY_LEASE=4s").cut(x.short)
			default:
				t.Skipf("SKIPPED: a cut of 30 s of %s; set TRIREME_CHAOS=1 to run it", x.service)
			}
		})
	}
}
