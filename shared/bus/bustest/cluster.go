package bustest

import (
	"fmt"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"trireme.dev/shared/wire"
)

// Cluster is a cluster of nats-servers with JetStream in this process.
type Cluster struct {
	tb      testing.TB
	options []*server.Options
	servers []*server.Server // nil: stopped
}

// RunCluster starts a cluster of n servers with empty stores; it is shut down when the test ends.
func RunCluster(tb testing.TB, n int) *Cluster {
	tb.Helper()
	c := &Cluster{tb: tb, servers: make([]*server.Server, n)}
	var routes []*url.URL
	ports := freePorts(tb, 2*n)
	for i := range n {
		routes = append(routes, &url.URL{Scheme: "nats", Host: fmt.Sprintf("127.0.0.1:%d", ports[n+i])})
	}
	for i := range n {
		o := &server.Options{
			ServerName: fmt.Sprintf("n%d", i), Host: "127.0.0.1", Port: ports[i], JetStream: true, StoreDir: tb.TempDir(),
			MaxPayload: wire.MaxMessage + 8<<10, NoSigs: true, NoLog: true, Routes: routes,
			Cluster: server.ClusterOpts{Name: "test", Host: "127.0.0.1", Port: ports[n+i]},
		}
		c.options = append(c.options, o)
	}
	tb.Cleanup(func() {
		for i := range c.servers {
			c.Stop(i)
		}
	})
	for i := range n {
		c.start(i)
	}
	c.await()
	return c
}

// freePorts are n ports that nobody listens on.
func freePorts(tb testing.TB, n int) []int {
	tb.Helper()
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			tb.Fatal(err)
		}
		defer l.Close()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports
}

// URL names all servers.
func (c *Cluster) URL() string {
	var urls []string
	for _, o := range c.options {
		urls = append(urls, fmt.Sprintf("nats://127.0.0.1:%d", o.Port))
	}
	return strings.Join(urls, ",")
}

// Leader is the number of the server that leads a stream, waited for.
func (c *Cluster) Leader(stream string) int {
	c.tb.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		for i, s := range c.servers {
			if s != nil && s.JetStreamIsStreamLeader(server.DEFAULT_GLOBAL_ACCOUNT, stream) {
				return i
			}
		}
	}
	c.tb.Fatalf("nobody leads stream %s", stream)
	return 0
}

// Stop shuts server i down: its connections end, its store stays.
func (c *Cluster) Stop(i int) {
	if s := c.servers[i]; s != nil {
		c.servers[i] = nil
		s.Shutdown()
		s.WaitForShutdown()
	}
}

// Start starts server i again after Stop and waits until it has caught up.
func (c *Cluster) Start(i int) {
	c.tb.Helper()
	c.start(i)
	c.await()
}

func (c *Cluster) start(i int) {
	c.tb.Helper()
	s, err := server.NewServer(c.options[i].Clone())
	if err != nil {
		c.tb.Fatal(err)
	}
	s.Start()
	c.servers[i] = s
}

// await waits until the servers have a leader that knows all that run, so that it can place copies on them, and these are current.
func (c *Cluster) await() {
	c.tb.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		ready, running, known := true, 0, 0
		for _, s := range c.servers {
			if s == nil {
				continue
			}
			ready = ready && s.ReadyForConnections(50*time.Millisecond) && s.Healthz(nil).Status == "ok"
			running++
			if s.JetStreamIsLeader() {
				known = len(s.JetStreamClusterPeers())
			}
		}
		if ready && known >= running {
			return
		}
	}
	c.tb.Fatal("the servers of the cluster do not come together")
}
