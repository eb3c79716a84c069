package composetest

import (
	"encoding/json"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// observed starts Prometheus from the observe profile: it finds every container, scaled ones too, and each expression
// of the dashboard gives an answer.
func (s *stack) observed(t *testing.T) {
	s.scale(t, "encoder=2")
	s.compose(t, "--profile", "observe", "up", "-d", "--no-build", "--no-recreate", "--no-deps", "prometheus")
	await(t, "Prometheus finds all containers", time.Minute, func() bool {
		up := s.targetsUp(t)
		return up["gateway"] == 1 && up["encoder"] == 2 && up["prefill"] == 1 && up["decoder"] == 1 && up["hmm"] == 1 && up["scaler"] == 1
	})
	l := s.start(t, 4)
	asked := 0
	for _, e := range expressions(t) {
		asked++
		var answer string
		took := await(t, "an answer to "+e, 40*time.Second, func() bool {
			var n int
			answer, n = s.query(t, e)
			return n > 0
		})
		if took > 20*time.Second {
			t.Logf("%s took %.0f s: %s", e, took.Seconds(), answer)
		}
	}
	l.stop(t)
	if asked < 10 {
		t.Errorf("the dashboard has only %d expressions", asked)
	}
	t.Logf("%d expressions of the dashboard have answers", asked)
	s.compose(t, "--profile", "observe", "rm", "--force", "--stop", "prometheus")
	s.scale(t, "encoder=1")
}

// prometheus asks Prometheus' HTTP API; false when it does not answer yet.
func (s *stack) prometheus(t *testing.T, path string, into any) bool {
	t.Helper()
	page, err := get("http://127.0.0.1:" + os.Getenv("TRIREME_PROMETHEUS_PORT") + path)
	if err != nil {
		return false
	}
	if err := json.Unmarshal([]byte(page), into); err != nil {
		t.Fatalf("%s: %v: %s", path, err, page)
	}
	return true
}

// targetsUp counts the targets that are scraped well, by job.
func (s *stack) targetsUp(t *testing.T) map[string]int {
	t.Helper()
	var answer struct {
		Data struct {
			ActiveTargets []struct {
				Health string
				Labels struct{ Job string }
			}
		}
	}
	up := map[string]int{}
	if s.prometheus(t, "/api/v1/targets?state=active", &answer) {
		for _, target := range answer.Data.ActiveTargets {
			if target.Health == "up" {
				up[target.Labels.Job]++
			}
		}
	}
	return up
}

// query asks an expression and returns the answer and its number of series.
func (s *stack) query(t *testing.T, expr string) (string, int) {
	t.Helper()
	var answer struct {
		Data struct{ Result []json.RawMessage }
	}
	if !s.prometheus(t, "/api/v1/query?query="+url.QueryEscape(expr), &answer) {
		return "", 0
	}
	first := ""
	if len(answer.Data.Result) > 0 {
		first = string(answer.Data.Result[0])
	}
	return first, len(answer.Data.Result)
}

// expressions are those of the dashboard, as Grafana would send them.
func expressions(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(root + "/deploy/grafana/dashboards/*.json")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var board struct {
			Panels []struct{ Targets []struct{ Expr string } }
		}
		if err := json.Unmarshal(data, &board); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		for _, p := range board.Panels {
			for _, target := range p.Targets {
				all = append(all, strings.ReplaceAll(target.Expr, "$__rate_interval", "20s"))
			}
		}
	}
	return all
}
