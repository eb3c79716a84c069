package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"trireme.dev/shared/wire"
)

// Operators change instances over HTTP as by the commands; what cannot be read, found or done has a status and says why.
func TestAdminEndpoints(t *testing.T) {
	t.Parallel()
	address := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	c := startWith(t, []string{"TRIREME_ADMIN=" + address}, "--topology", "1E1P1Dx2+1", "--threads", "1", "--domains", "node")
	ask := func(method, path, body string) (int, wire.ChangeReport, string) {
		t.Helper()
		r, err := http.NewRequest(method, "http://"+address+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		var report wire.ChangeReport
		if err == nil && strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json") {
			err = json.Unmarshal(data, &report)
		}
		if err != nil {
			t.Fatalf("%s %s: %v, %s", method, path, err, data)
		}
		return resp.StatusCode, report, string(data)
	}
	for _, x := range []struct {
		path, body string
		status     int
		says       string
	}{
		{"decoder/scale", `{"npus":4}`, 409, "2 more NPUs are wanted"},
		{"nobody/scale", `{"npus":3}`, 404, "no such instance"},
		{"gateway/scale", `{"npus":3}`, 404, "a gateway has no NPUs"},
		{"decoder/scale", `{"npus":"many"}`, 400, "no number of NPUs"},
		{"decoder/scale", `{}`, 400, "npus is missing"},
		{"decoder/scale", ``, 400, "npus is missing"},
		{"encoder/rebalance", ``, 409, "has no experts"},
		{"decoder/scale/now", `{}`, 404, "/admin/instances/NAME/scale"},
		{"decoder/scale", `{"npus":-3}`, 409, "cannot have -1"},
		{"decoder/scale", `{"npus":0}`, 409, "no other instance with NPUs could decode"},
		{"decoder/scale", `{"npu":3}`, 400, "unknown field"},
		{"decoder/scale", `{"npus":3,"timeout":"soon"}`, 400, "no duration"},
		{"decoder/explode", `{}`, 400, "not explode"},
		{"encoder/rebalance", `{}`, 409, "has no experts"},
		{"decoder/rebalance", `{"spare":-1}`, 400, "cannot be negative"},
	} {
		if status, _, said := ask("POST", "/admin/instances/"+x.path, x.body); status != x.status || !strings.Contains(said, x.says) {
			t.Errorf("%s %s: %d %s; want %d, %s", x.path, x.body, status, said, x.status, x.says)
		}
	}
	if status, _, said := ask("GET", "/admin/instances", ""); status != 200 || !strings.Contains(said, "decoder-0") {
		t.Errorf("instances: %d %s", status, said)
	}
	if status, _, _ := ask("GET", "/v1/models", ""); status != 404 {
		t.Errorf("the API is at the operators' address: %d", status)
	}
	if resp, err := http.Get(c.url + "/admin/instances"); err != nil || resp.StatusCode != 404 || resp.Body.Close() != nil {
		t.Errorf("clients reach the operators' endpoints: %v, %v", resp, err)
	}
	// A browser sends these for a page of anywhere, without asking first: the second where the page's own name has been made to lead here.
	for _, headers := range []http.Header{
		{"Origin": {"https://elsewhere.example"}}, {"Origin": {"http://" + address}}, {"Origin": {"null"}}, {"Sec-Fetch-Site": {"cross-site"}},
	} {
		page, err := http.NewRequest("POST", "http://"+address+"/admin/instances/decoder/scale", strings.NewReader(`{"npus":"+1"}`))
		if err != nil {
			t.Fatal(err)
		}
		page.Header = headers
		page.Header.Set("Content-Type", "text/plain")
		if resp, err := http.DefaultClient.Do(page); err != nil || resp.StatusCode != 403 || resp.Body.Close() != nil {
			t.Errorf("a page may change instances, with %v: %v, %v", headers, resp, err)
		}
	}
	c.expectDecoder(t, 2, 1, 0)
	if status, r, said := ask("POST", "/admin/instances/decoder/scale", `{"npus":"+1","dry_run":true}`); status != 200 || wire.NPUCount(r.Plan.After) != 3 || r.Committed {
		t.Errorf("a dry run: %d %s", status, said)
	}
	c.expectDecoder(t, 2, 1, 0)
	if status, r, said := ask("POST", "/admin/instances/decoder-0/scale", `{"npus":"+1","timeout":"2m"}`); status != 200 || r.Epoch != 1 || !r.Committed {
		t.Errorf("one more: %d %s", status, said)
	}
	c.expectDecoder(t, 3, 0, 1)
	if status, r, said := ask("POST", "/admin/instances/decoder/rebalance", `{"slack":0,"spare":0.5}`); status != 200 || r.State != "done" {
		t.Errorf("rebalanced: %d %s", status, said)
	}
}
