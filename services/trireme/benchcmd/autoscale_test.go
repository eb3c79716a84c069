package benchcmd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// saysTwice runs what writes a table twice: it has to say some words, and both times the same.
func saysTwice(t *testing.T, out *bytes.Buffer, run func() error, words ...string) {
	t.Helper()
	if err := run(); err != nil {
		t.Fatal(err)
	}
	first := out.String()
	for _, want := range words {
		if !strings.Contains(first, want) {
			t.Errorf("the table does not say %q:\n%s", want, first)
		}
	}
	out.Reset()
	if err := run(); err != nil || out.String() != first {
		t.Errorf("the same seed gives another table, %v", err)
	}
}

// One scenario, as a table and as JSON with its files.
func TestAutoscale(t *testing.T) {
	dir := t.TempDir()
	var out, progress bytes.Buffer
	env := Env{Context: context.Background(), Out: &out, Err: &progress}
	c := Autoscale{Scenarios: []string{"paper"}, Pace: "distserve-opt-13b-a100", Seed: 3, Seeds: 1}
	saysTwice(t, &out, func() error { return c.Run(env) },
		"SIMULATED", "trireme", "best static", "epd-trigger", "elasticmoe-rule", "hpa-queue", "simulated, not measured")
	out.Reset()
	c.JSON, c.CSV, c.Plot = true, filepath.Join(dir, "a.csv"), filepath.Join(dir, "a.svg")
	if err := c.Run(env); err != nil {
		t.Fatal(err)
	}
	var r AutoscaleReport
	if err := json.Unmarshal(out.Bytes(), &r); err != nil || !r.Simulated || len(r.Reports) != 1 || len(r.Reports[0].Runs) != 6 {
		t.Errorf("%v: %+v", err, r)
	}
	for _, file := range []string{"a.csv", "a-paper.svg"} {
		if data, err := os.ReadFile(filepath.Join(dir, file)); err != nil || len(data) < 1000 {
			t.Errorf("%s: %d bytes, %v", file, len(data), err)
		}
	}
}

func TestAutoscaleUsage(t *testing.T) {
	good := Autoscale{Scenarios: []string{"paper"}, Pace: "distserve-opt-13b-a100", Seeds: 1}
	for name, change := range map[string]func(*Autoscale){
		"scenario": func(c *Autoscale) { c.Scenarios = []string{"storm"} },
		"seeds":    func(c *Autoscale) { c.Seeds = 0 },
		"rate":     func(c *Autoscale) { c.Rate = -1 },
		"plot":     func(c *Autoscale) { c.Plot = "a.pdf" },
	} {
		c := good
		change(&c)
		if err := c.Run(Env{Context: context.Background(), Out: &bytes.Buffer{}, Err: &bytes.Buffer{}}); !errors.Is(err, ErrUsage) {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := good
	c.Policy = filepath.Join(t.TempDir(), "none.yaml")
	if err := c.Run(Env{Context: context.Background(), Out: &bytes.Buffer{}, Err: &bytes.Buffer{}}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if err := good.Run(Env{Context: ended, Out: &bytes.Buffer{}, Err: &bytes.Buffer{}}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
