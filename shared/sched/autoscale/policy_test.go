package autoscale_test

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/sched/autoscale"
)

func parse(t *testing.T, file string) (autoscale.Policy, error) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", "policy", file))
	if err != nil {
		t.Fatal(err)
	}
	return autoscale.Parse(data)
}

func TestGoodPolicies(t *testing.T) {
	for file, change := range map[string]func(*autoscale.Policy){
		"empty.yaml": func(*autoscale.Policy) {},
		"short.yaml": func(p *autoscale.Policy) { p.Targets.TTFT, p.Actions = 500*time.Millisecond, nil },
		"all.yaml": func(p *autoscale.Policy) {
			p.Mode, p.Budget, p.Bounds[autoscale.Encode].Max, p.Bounds[autoscale.Decode].Min = autoscale.Auto, 8, 6, 2
			p.Costs[autoscale.Move] = autoscale.Cost{Time: 3 * time.Second, Bytes: 1e9}
		},
	} {
		want := autoscale.Default()
		change(&want)
		got, err := parse(t, "good/"+file)
		if err != nil {
			t.Errorf("%s: %v", file, err)
			continue
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, want %+v", file, got, want)
		}
		if s := got.Describe(); !strings.Contains(s, "90% of requests") || !strings.Contains(s, "decode:") {
			t.Errorf("%s means %q", file, s)
		}
	}
}

// An error says where it is, what is wrong, and what to write instead.
func TestBadPolicies(t *testing.T) {
	says := map[string][]string{
		"unknown":       {"line 2", "bugdet", "budget"},
		"unknown-below": {"line 3", "stages.decode.least", "min"},
		"mode":          {`"on-off"`, "advise"},
		"duration":      {"line 2", "grow.window", "500ms"},
		"number":        {"line 1", "budget", "whole number"},
		"bounds":        {"encode", "max 2", "raise max"},
		"budget":        {"decode", "min 3", "raise budget"},
		"action":        {"explode", "rebalance"},
		"twice":         {"line 2", "band", "twice"},
		"list":          {"line 1", "actions", "list"},
		"no-band":       {"band", "0.15"},
		"windows":       {"shrink.window", "grow.window 2m"},
		"weights":       {"late", "npu 20"},
		"shape":         {"line 1", "mapping", "targets"},
		"syntax":        {"yaml"},
		"percentile":    {"percentile", "below 100"},
		"utilisation":   {"prefill.utilisation", "70"},
		"nan":           {"line 1", "band", "no number"},
	}
	files, err := filepath.Glob("testdata/policy/bad/*.yaml")
	if err != nil || len(files) != len(says) {
		t.Fatalf("%d files, %d are known, %v", len(files), len(says), err)
	}
	for name, words := range says {
		_, err := parse(t, "bad/"+name+".yaml")
		if !errors.Is(err, autoscale.ErrPolicy) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q does not say %q", name, err, w)
			}
		}
	}
}
