package hmm_test

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"

	"trireme.dev/services/hmm"
)

// natsServer starts a real server on a free port and returns a connection for the daemon and one for the test.
func natsServer(t testing.TB) (daemon, test *nats.Conn) {
	t.Helper()
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true})
	must(t, err)
	s.Start()
	t.Cleanup(func() {
		s.Shutdown()
		s.WaitForShutdown()
	})
	if !s.ReadyForConnections(10 * time.Second) {
		t.Fatal("the NATS server does not start")
	}
	connect := func() *nats.Conn {
		nc, err := nats.Connect(s.ClientURL())
		must(t, err)
		t.Cleanup(nc.Close)
		return nc
	}
	return connect(), connect()
}

func TestNATS(t *testing.T) {
	theirs, nc := natsServer(t)
	d, socket := daemon(t, func(c *hmm.Config) { c.NATS = theirs })
	c := dial(t, socket, hbm.Hello{Instance: "d1", Role: "decode"}) // when this is answered, the daemon is ready
	o := alloc(t, c, hbm.Spec{Kind: mem.KindKV, NPU: 0, Bytes: 100, Ref: ref("r", 1)})
	k := claim(t, c, decodePart("r", 1, 0), "ack")
	free(t, c, o...)

	// Stats as JSON, of this node and of all.
	for _, subject := range []string{hmm.SubjectStats("n1"), wire.SubjectHMM} {
		m, err := nc.Request(subject, nil, 5*time.Second)
		must(t, err)
		var s hbm.Stats
		must(t, json.Unmarshal(m.Data, &s))
		if s.Node != "n1" || s.Objects != 1 || len(s.Memory) != 3 || s.Memory[1].Kinds["kv"].Used != 100 || s.Memory[1].Capacity != 64*page {
			t.Errorf("stats on %s: %s", subject, m.Data)
		}
	}

	// The end of one choice ends nothing here, garbage harms nothing, the end of the request frees.
	publish := func(data []byte) {
		t.Helper()
		must(t, nc.Publish(wire.SubjectDone, data))
	}
	done := func(choice int) []byte {
		data, err := wire.Marshal(wire.Done{Request: "r", Choice: choice})
		must(t, err)
		return data
	}
	publish([]byte("garbage"))
	publish(nil)
	publish(done(0))
	_, err := nc.Request(hmm.SubjectStats("n1"), nil, 5*time.Second)
	must(t, err)
	if s := d.Stats(); s.Objects != 1 || !k.Held() {
		t.Errorf("the end of a choice ended the request: %+v", s)
	}
	publish(done(-1))
	eventually(t, "a done event frees", func() bool { return d.Stats().Objects == 0 })
	if k.Held() {
		t.Error("the claim of a done request is held")
	}

	// A connection that ends is announced.
	gone, err := nc.SubscribeSync(wire.SubjectGone)
	must(t, err)
	must(t, nc.Flush())
	must(t, c.Close())
	m, err := gone.NextMsg(5 * time.Second)
	must(t, err)
	var g wire.Gone
	must(t, wire.Unmarshal(m.Data, &g))
	if g != (wire.Gone{Node: "n1", Instance: "d1", Role: "decode"}) {
		t.Errorf("gone: %+v", g)
	}
}
