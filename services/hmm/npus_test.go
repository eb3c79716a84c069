package hmm_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"

	"trireme.dev/services/hmm"
)

// owners is who has each NPU: an instance, =NAME that it is reserved for, or -.
func owners(d *hmm.Daemon) (all []string) {
	for _, n := range d.Stats().Memory[1:] {
		switch {
		case n.Instance != "":
			all = append(all, n.Instance)
		case n.Reserved != "":
			all = append(all, "="+n.Reserved)
		default:
			all = append(all, "-")
		}
	}
	return all
}

func wantOwners(t *testing.T, d *hmm.Daemon, want ...string) {
	t.Helper()
	if got := owners(d); !slices.Equal(got, want) {
		t.Errorf("the NPUs are %v, want %v", got, want)
	}
}

func TestJoinAndPart(t *testing.T) {
	d, socket := daemon(t, func(c *hmm.Config) { c.NPUs = 5 })
	a := dial(t, socket, hbm.Hello{Instance: "a", NPUs: 1})
	b := dial(t, socket, hbm.Hello{Instance: "b", Want: []int{4, 2}})
	if !slices.Equal(b.NPUs(), []int{4, 2}) {
		t.Errorf("b wanted 4 and 2, has %v", b.NPUs())
	}
	wantErr(t, a.Join(t.Context(), 1, 2), mem.ErrExhausted)
	wantErr(t, a.Join(t.Context(), 5), mem.ErrInvalid)
	wantOwners(t, d, "a", "-", "b", "-", "b")
	must(t, a.Join(t.Context(), 3))
	got, err := a.JoinAny(t.Context(), 1)
	must(t, err)
	if !slices.Equal(got, []int{1}) || !slices.Equal(a.NPUs(), []int{0, 3, 1}) {
		t.Errorf("a joined %v, has %v", got, a.NPUs())
	}
	wantOwners(t, d, "a", "a", "b", "a", "b")
	_, err = a.JoinAny(t.Context(), 1)
	wantErr(t, err, mem.ErrExhausted)

	o := alloc(t, a, kv(3, page), hbm.Spec{Kind: mem.KindKV, NPU: 3, Bytes: page, Ref: ref("r", 1)})
	wantErr(t, a.Part(t.Context(), 1, 3), mem.ErrInvalid) // one is nobody's but a's
	wantErr(t, a.Part(t.Context(), 2), mem.ErrInvalid)    // b's
	wantOwners(t, d, "a", "a", "b", "a", "b")
	must(t, a.Free(t.Context(), o[0]))
	must(t, a.Part(t.Context(), 1, 3))
	if !slices.Equal(a.NPUs(), []int{0}) {
		t.Errorf("a has %v", a.NPUs())
	}
	wantOwners(t, d, "a", "-", "b", "-", "b")
	_, err = b.JoinAny(t.Context(), 2)
	must(t, err)
	must(t, b.Close())
	wantOwners(t, d, "a", "-", "-", "-", "-")
	wantErr(t, dial(t, socket, hbm.Hello{Instance: "g", Role: "gateway"}).Join(t.Context(), 1), mem.ErrDenied)
}

// TestNPUsOfAName shows that an instance which is started again has the NPUs that it had, whoever asks meanwhile.
func TestNPUsOfAName(t *testing.T) {
	d, socket := daemon(t, func(c *hmm.Config) { c.NPUs, c.Reserve = 3, time.Hour })
	child, r := start(t, "named", socket)
	if !slices.Equal(r.NPUs, []int{0}) {
		t.Fatalf("the child has NPUs %v", r.NPUs)
	}
	for i := range 3 {
		kill(t, child) // and its name is free once the HMM has noticed
		c := dial(t, socket, hbm.Hello{Instance: fmt.Sprint("again", i), Name: "decoder-0", NPUs: 1})
		if !slices.Equal(c.NPUs(), []int{0}) {
			t.Errorf("started again it has NPUs %v", c.NPUs())
		}
		must(t, c.Close())
		other := dial(t, socket, hbm.Hello{Instance: "other", NPUs: 2})
		wantOwners(t, d, "=decoder-0", "other", "other")
		_, err := hbm.Dial(t.Context(), socket, hbm.Hello{Instance: "third", Role: "decode", NPUs: 1})
		wantErr(t, err, mem.ErrExhausted)
		must(t, other.Close())
		child, r = start(t, "named", socket)
		if !slices.Equal(r.NPUs, []int{0}) {
			t.Errorf("the child has NPUs %v", r.NPUs)
		}
	}
	_, err := hbm.Dial(t.Context(), socket, hbm.Hello{Instance: "twin", Role: "decode", Name: "decoder-0"})
	wantErr(t, err, mem.ErrDenied)
	for _, said := range []string{`"child" has the name "decoder-0"`, "--name"} {
		if !strings.Contains(err.Error(), said) {
			t.Errorf("the refusal of a name that is taken is %q, without %s", err, said)
		}
	}
	if strings.Contains(err.Error(), "capability") {
		t.Errorf("a name that is taken is refused with %q", err)
	}
}

func TestNothingIsReserved(t *testing.T) {
	d, socket := daemon(t, func(c *hmm.Config) { c.Reserve = -1 })
	must(t, dial(t, socket, hbm.Hello{Name: "decoder-0", NPUs: 2}).Close())
	wantOwners(t, d, "-", "-")
}
