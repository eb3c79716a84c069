package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/wire"
)

// Instances come and go at an operator's word while a request is answered, as far as NPUs are spare and each role stays with somebody.
func TestReplicasComeAndGo(t *testing.T) {
	t.Parallel()
	admin := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	c := startWith(t, []string{"TRIREME_ADMIN=" + admin}, "--topology", "1E1P1D+1")
	post := func(body string) (status int, r wire.ReplicasReport, said string) { // the same over HTTP
		t.Helper()
		resp, err := http.Post("http://"+admin+"/admin/replicas", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		if err == nil {
			err = json.Unmarshal(data, &r)
		}
		if err != nil {
			t.Fatalf("%s: %v, %s", body, err, data)
		}
		return resp.StatusCode, r, string(data)
	}
	scale := func(args ...string) (r wire.ReplicasReport, said string) {
		t.Helper()
		path, err := binary()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(path, append([]string{"scale", "--nats-url", "nats://" + c.nats, "--json"}, args...)...)
		var text strings.Builder
		cmd.Stderr = &text
		if out, err := cmd.Output(); err != nil {
			return r, text.String()
		} else if err := json.Unmarshal(out, &r); err != nil {
			t.Fatal(err)
		}
		return r, ""
	}
	g := loadGoldens(t)[0]
	ask := func(what string) {
		t.Helper()
		s, err := c.stream(t.Context(), g.params(t), nil)
		if err != nil || s.text != g.Output {
			t.Errorf("%s: %q, %v; want %q", what, s.text, err, g.Output)
		}
	}
	if r, said := scale("decoder", "--replicas", "2", "--dry-run"); said != "" || len(r.Started) > 0 || r.NPUs != 1 || r.Weights < 10<<20 || r.Fresh != 0 {
		t.Errorf("a plan: %+v, %s", r, said)
	}
	more, said := scale("decoder", "--replicas", "2")
	if said != "" || !slices.Equal(more.Started, []string{"decoder-1"}) || len(more.Instances) != 2 {
		t.Fatalf("one decoder more: %+v, %s", more, said)
	}
	ask("with two decoders")
	if _, said := scale("prefill", "--replicas", "2"); !strings.Contains(said, "and there are 0") {
		t.Errorf("more than there is: %q", said)
	}
	less, said := scale("decoder", "--replicas", "1")
	if said != "" || !slices.Equal(less.Stopped, []string{"decoder-1"}) {
		t.Fatalf("one decoder less: %+v, %s", less, said)
	}
	ask("with one again")
	if _, said := scale("decoder", "--replicas", "0"); !strings.Contains(said, "no instance with role D would be left") {
		t.Errorf("no decoder: %q", said)
	}
	for _, x := range []struct {
		body   string
		status int
		says   string
	}{
		{`{"role":"decoder","replicas":1}`, 200, "decoder-0"}, {`{"role":"decoder","replicas":0}`, 409, "no instance with role D would be left"},
		{`{"role":"decoder"}`, 400, "replicas is missing"}, {`{"replicas":2}`, 400, "role or"}, {`{"role":"decoder","replicas":2,"timeout":"soon"}`, 400, "no duration"},
		{`{"role":"decoder","replicas":1,"node":"elsewhere"}`, 404, "nobody starts instances"}, {`{"role":"cook","replicas":1}`, 409, "cook"},
		{`{"role":"decoder","replicas":-1}`, 409, "none at the least"},
	} {
		if status, _, said := post(x.body); status != x.status || !strings.Contains(said, x.says) {
			t.Errorf("%s: %d %s; want %d, %s", x.body, status, said, x.status, x.says)
		}
	}
	// The one that has ended takes nothing any more before it lets go of its NPU, which is kept for it for a while then.
	status, r, said := post(`{"role":"prefill","replicas":2}`)
	for deadline := time.Now().Add(time.Minute); strings.Contains(said, "spare NPUs") && time.Now().Before(deadline); {
		time.Sleep(100 * time.Millisecond)
		status, r, said = post(`{"role":"prefill","replicas":2}`)
	}
	if status != 200 || !slices.Equal(r.Started, []string{"prefill-1"}) {
		t.Errorf("the NPU that became spare goes to another stage: %d, %s", status, said)
	}
	ask("with two of prefill")
}
