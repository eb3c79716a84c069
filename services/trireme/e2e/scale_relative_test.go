package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"trireme.dev/shared/wire"
)

// One more NPU is one more than the instance has when it begins, and not than a heartbeat of a second ago says it has.
func TestScaleByOneTwice(t *testing.T) {
	t.Parallel()
	admin := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	c := startWith(t, []string{"TRIREME_ADMIN=" + admin}, "--topology", "1E1P1D+3", "--threads", "1")
	for _, want := range []int{2, 3} {
		r, err := c.change(t, "scale", "decoder", "+1")
		if err != nil || !r.Committed || wire.NPUCount(r.Plan.After) != want {
			t.Fatalf("+1: %+v, %v; want %d NPUs", r, err, want)
		}
	}
	resp, err := http.Post("http://"+admin+"/admin/instances/decoder/scale", "application/json", strings.NewReader(`{"npus":"+1"}`))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("+1 over HTTP: %s", resp.Status)
	}
	r, err := c.change(t, "scale", "decoder", "-3")
	if err != nil || !r.Committed || wire.NPUCount(r.Plan.Before) != 4 || wire.NPUCount(r.Plan.After) != 1 {
		t.Fatalf("-3: %+v, %v; want 1 NPU of 4", r, err)
	}
	if _, err := c.change(t, "scale", "decoder", "-2"); err == nil || !strings.Contains(err.Error(), "has 1 NPUs and cannot have -1") {
		t.Errorf("-2 of 1: %v", err)
	}
	if _, err := c.change(t, "scale", "decoder", "+4"); err == nil || !strings.Contains(err.Error(), "4 more NPUs are wanted, and node") {
		t.Errorf("+4 of 3: %v", err)
	}
}
