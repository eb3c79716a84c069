package hmm_test

import (
	"bytes"
	"errors"
	"net"
	"strings"
	"testing"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm"
)

// twoNodes runs the HMMs n1 and n2, which know each other, and returns a client of each with one NPU.
func twoNodes(t testing.TB, change ...func(*hmm.Config)) (daemons map[string]*hmm.Daemon, one, two *hbm.Client) {
	t.Helper()
	daemons = map[string]*hmm.Daemon{}
	theirs, _ := natsServer(t)
	sockets := map[string]string{}
	for _, node := range []string{"n1", "n2"} {
		daemons[node], sockets[node] = daemon(t, append(change, func(c *hmm.Config) {
			c.Node, c.NATS, c.Peers = node, theirs, &hmm.Peers{Listen: "127.0.0.1:0"}
		})...)
	}
	return daemons, dial(t, sockets["n1"], hbm.Hello{Instance: "one", Role: "decode", NPUs: 1}),
		dial(t, sockets["n2"], hbm.Hello{Instance: "two", Role: "decode", NPUs: 1})
}

// written allocates KV of n bytes on NPU 0 and fills it.
func written(t *testing.T, c *hbm.Client, n int64) *hbm.Object {
	t.Helper()
	o := alloc(t, c, kv(0, n))[0]
	for i := range o.Bytes() {
		o.Bytes()[i] = byte(i * 7 >> 3)
	}
	return o
}

func TestAttachPullsFromAnotherNode(t *testing.T) {
	daemons, one, two := twoNodes(t)
	ctx := t.Context()
	sealed, open := written(t, one, 20*page+5), written(t, one, 3*page)
	if _, err := one.Seal(ctx, ref("r", 1), sealed); err != nil {
		t.Fatal(err)
	}
	local := written(t, two, page)
	objects, err := two.Attach(ctx, mem.ReadOnly, 0, local.Handle(), sealed.Handle(), open.Handle())
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []*hbm.Object{local, sealed, open} {
		got := objects[i]
		if !bytes.Equal(got.Bytes(), want.Bytes()) {
			t.Errorf("object %d has other content", i)
		}
		h, from := got.Handle(), want.Handle()
		if h.Node != "n2" || h.Sealed != from.Sealed || h.CRC != from.CRC || h.Bytes != from.Bytes || h.Kind != from.Kind {
			t.Errorf("object %d is %+v, want a copy on n2 of %+v", i, h, from)
		}
	}
	if err := objects[1].Verify(); err != nil {
		t.Error(err)
	}
	again, err := two.Attach(ctx, mem.ReadOnly, 0, objects[1].Handle()) // the copy has a good name of its own
	if err != nil {
		t.Fatal(err)
	}
	if err := two.Free(ctx, append(objects, again...)...); err != nil {
		t.Fatal(err)
	}
	if n := daemons["n2"].Stats().Objects; n != 1 {
		t.Errorf("%d objects are left on n2, want 1", n)
	}
	eventually(t, "n1 has one's two holds on two objects, and the request's; those for sending end after the taker has all", func() bool {
		s := daemons["n1"].Stats()
		return s.Objects == 2 && s.Holds == 3
	})
}

func TestRefusedPullsLeaveNothing(t *testing.T) {
	daemons, one, two := twoNodes(t)
	ctx := t.Context()
	good := written(t, one, 5*page)
	if _, err := one.Seal(ctx, ref("r", 1), good); err != nil {
		t.Fatal(err)
	}
	gone := written(t, one, page)
	freed := gone.Handle()
	free(t, one, gone)
	with := func(change func(*mem.Handle)) mem.Handle {
		h := good.Handle()
		change(&h)
		return h
	}
	for name, tc := range map[string]struct {
		h      mem.Handle
		access mem.Access
		npu    int
		want   error
	}{
		"freed":                 {freed, mem.ReadOnly, 0, mem.ErrGone},
		"forged":                {with(func(h *mem.Handle) { h.Capability = make([]byte, 16) }), mem.ReadOnly, 0, mem.ErrDenied},
		"sealed, for writing":   {good.Handle(), mem.ReadWrite, 0, mem.ErrSealed},
		"no NPU":                {good.Handle(), mem.ReadOnly, -1, mem.ErrInvalid},
		"no room":               {with(func(h *mem.Handle) { h.Bytes = 65 * page }), mem.ReadOnly, 0, mem.ErrExhausted},
		"checksum of the other": {with(func(h *mem.Handle) { h.CRC ^= 1 }), mem.ReadOnly, 0, mem.ErrDenied},
		"node that is not":      {with(func(h *mem.Handle) { h.Node = "n3" }), mem.ReadOnly, 0, mem.ErrGone},
		"no node's name":        {with(func(h *mem.Handle) { h.Node = "*" }), mem.ReadOnly, 0, mem.ErrInvalid},
	} {
		_, err := two.Attach(ctx, tc.access, tc.npu, good.Handle(), tc.h)
		if !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
		if s := daemons["n2"].Stats(); s.Objects != 0 || s.Holds != 0 {
			t.Errorf("%s: %d objects are left", name, s.Objects)
		}
	}
}

// What an HMM announces: where it listens, or what it is told to; for a wildcard address, where NATS sees it.
func TestAnnouncedAddress(t *testing.T) {
	theirs, _ := natsServer(t)
	for listen, tc := range map[string]struct {
		node, announce, want string
	}{
		"":            {"n1", "", ""},
		"127.0.0.1:0": {"n2", "", "127.0.0.1:port"},
		"0.0.0.0:0":   {"n3", "", "127.0.0.1:port"},
		"[::1]:0":     {"n4", "node.example:7000", "node.example:7000"},
	} {
		d, _ := daemon(t, func(c *hmm.Config) {
			c.Node, c.NATS, c.Peers = tc.node, theirs, &hmm.Peers{Listen: listen, Announce: tc.announce}
		})
		want := tc.want
		if host, ok := strings.CutSuffix(want, "port"); ok {
			_, port, err := net.SplitHostPort(d.PeerAddress().String())
			must(t, err)
			want = host + port
		}
		if got := d.Stats().Peer; got != want {
			t.Errorf("listening at %q with %q it announces %q, want %q", listen, tc.announce, got, want)
		}
	}
}

// Many objects of one Attach, pulled some at a time, each come to their place.
func TestAttachPullsMany(t *testing.T) {
	daemons, one, two := twoNodes(t)
	var specs []hbm.Spec
	for i := range 40 {
		specs = append(specs, kv(0, int64(1+i*977)))
	}
	var handles []mem.Handle
	theirs := alloc(t, one, specs...)
	for i, o := range theirs {
		fill(o, byte(i))
		handles = append(handles, o.Handle())
	}
	mine := attach(t, two, mem.ReadOnly, 0, handles...)
	for i, o := range mine {
		if from, ok := o.Source(); !bytes.Equal(o.Bytes(), filled(specs[i].Bytes, byte(i))) || !ok || from.Object != handles[i].Object {
			t.Errorf("object %d is another one, or has other content", i)
		}
	}
	free(t, two, mine...)
	handles[33].Generation++
	if _, err := two.Attach(t.Context(), mem.ReadOnly, 0, handles...); !errors.Is(err, mem.ErrGone) {
		t.Errorf("with one that is gone: %v", err)
	}
	if s := daemons["n2"].Stats(); s.Objects != 0 {
		t.Errorf("%d objects are left", s.Objects)
	}
	free(t, one, theirs...)
}
