package benchcmd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"trireme.dev/services/trireme/load"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/plan"
	"trireme.dev/shared/sched/simulate"
	"trireme.dev/shared/wire"
)

// smallPlan is one for three NPUs.
func smallPlan() Plan {
	one := load.Span{Min: 1, Max: 1}
	return Plan{
		NPUs: 3, Profile: "distserve-opt-13b-a100", SLO: "ttft:1.4s,tpot:60ms", Percentile: 90, Prompt: load.Span{Min: 20, Max: 60}, Pictures: one,
		Size: load.Size{W: 256, H: 256}, Output: load.Span{Min: 5, Max: 20}, Rows: []int{512}, StepTokens: []int{128}, Top: 3, Seed: 1, Seeds: 2,
		Real: time.Minute, Random: 2, Roles: []string{"E", "P", "D", "PD", "EPD"},
	}
}

func TestPlan(t *testing.T) {
	var out bytes.Buffer
	env := Env{Context: t.Context(), Out: &out, Err: new(bytes.Buffer)}
	c := smallPlan()
	c.Beside = []string{"3EPD"}
	saysTwice(t, &out, func() error { return c.Run(env) },
		"SIMULATED", "2E1PD", "3EPD", "E ", "Not simulated", "Run it:  trireme up --topology ", "2 topologies by chance")
	out.Reset()
	c.JSON, c.Plot = true, filepath.Join(t.TempDir(), "p.svg")
	if err := c.Run(env); err != nil {
		t.Fatal(err)
	}
	var r PlanReport
	if err := json.Unmarshal(out.Bytes(), &r); err != nil || !r.Simulated || !r.Complete || r.NPUs != 3 || r.Topologies != 20 || r.RandomMean <= 0 || r.Worth < 1 {
		t.Fatalf("%v: %s", err, out.String())
	}
	if x := r.Best[0]; x.Goodput < 2 || !x.Judged || len(x.Each) != 2 || x.Detail.Attainment < 0.9 || x.Detail.TTFT[1] <= 0 || x.Limit == "" || !x.Alike {
		t.Errorf("%+v", x)
	}
	for _, file := range []string{"p.svg", "p-split.svg"} {
		if data, err := os.ReadFile(filepath.Join(filepath.Dir(c.Plot), file)); err != nil || len(data) < 1000 {
			t.Errorf("%s: %d bytes, %v", file, len(data), err)
		}
	}
}

// With a rate the fewest NPUs are looked for.
func TestPlanFewest(t *testing.T) {
	var out bytes.Buffer
	env := Env{Context: t.Context(), Out: &out, Err: new(bytes.Buffer)}
	c := smallPlan()
	c.NPUs, c.Rate, c.JSON, c.Random = 0, 4, true, 0
	if err := c.Run(env); err != nil {
		t.Fatal(err)
	}
	var r PlanReport
	if err := json.Unmarshal(out.Bytes(), &r); err != nil || r.NPUs < 3 || r.NPUs > 6 || r.Best[0].Goodput < 3.5 {
		t.Errorf("%v: %s", err, out.String())
	}
	c.NPUs = 1
	if err := c.Run(env); err == nil || !strings.Contains(err.Error(), "--npus") {
		t.Errorf("%v", err)
	}
}

// Who stops a search is told what is known.
func TestPlanStopped(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var out bytes.Buffer
	c := smallPlan()
	c.NPUs, c.Roles = 6, nil
	s, err := c.study(Env{Context: ctx, Out: &out, Err: new(bytes.Buffer)})
	if err != nil {
		t.Fatal(err)
	}
	calls := 0
	s.next = func(string) {
		if calls++; calls == 2 {
			cancel()
		}
	}
	stopped := s.search()
	if !errors.Is(stopped, context.Canceled) || len(s.report.rows) == 0 {
		t.Fatalf("%d rows, %v", len(s.report.rows), stopped)
	}
	s.fill(true)
	if err := s.report.writeTable(&out); err != nil || !strings.Contains(out.String(), "STOPPED") || !strings.Contains(out.String(), "not judged") {
		t.Errorf("%v\n%s", err, out.String())
	}
}

func TestPlanRefuses(t *testing.T) {
	for name, change := range map[string]func(*Plan){
		"targets":      func(c *Plan) { c.SLO = "soon" },
		"one target":   func(c *Plan) { c.SLO = "ttft:1s" },
		"percentile":   func(c *Plan) { c.Percentile = 100 },
		"NPUs":         func(c *Plan) { c.NPUs = 1000 },
		"seeds":        func(c *Plan) { c.Seeds = 1 },
		"no output":    func(c *Plan) { c.Output = load.Span{} },
		"plot":         func(c *Plan) { c.Plot = "a.pdf" },
		"roles":        func(c *Plan) { c.Roles = []string{"E", "PE"} },
		"nobody looks": func(c *Plan) { c.Roles = []string{"PD"} },
		"no decode":    func(c *Plan) { c.Roles = []string{"E", "P"} },
		"beside":       func(c *Plan) { c.Beside = []string{"3E"} },
		"two loads":    func(c *Plan) { c.Trace, c.FromRunning = "x", time.Second },
		"validate":     func(c *Plan) { c.Trace, c.Validate = "x", true },
	} {
		c := smallPlan()
		change(&c)
		if err := c.Run(Env{Context: t.Context(), Out: new(bytes.Buffer), Err: new(bytes.Buffer)}); !errors.Is(err, ErrUsage) {
			t.Errorf("%s: %v", name, err)
		}
	}
	c := smallPlan()
	c.SLO = "ttft:10ms,tpot:1ms"
	if err := c.Run(Env{Context: t.Context(), Out: new(bytes.Buffer), Err: new(bytes.Buffer)}); err == nil || !strings.Contains(err.Error(), "too strict") {
		t.Errorf("%v", err)
	}
}

func TestCommand(t *testing.T) {
	for _, x := range []struct {
		topology    string
		rows, steps int
		want        string
	}{
		{"5E2P1D", 512, 128, "trireme up --topology 5E2P1D"},
		{"5E2P1D", 1024, 64, "TRIREME_ROWS=1024 trireme up --topology 5E2P1D"},
		{"7E1PD", 512, 64, "TRIREME_STEP_TOKENS=64 trireme up --topology 7E1PD"},
	} {
		topology := plan.Config{Rows: x.rows, Steps: x.steps}
		for _, s := range plan.Splits(8) {
			if s.String() == x.topology {
				topology.Topology = s
			}
		}
		if got := command(topology); got != x.want {
			t.Errorf("%s, want %s", got, x.want)
		}
	}
}

// Requests of files come as they came, and what a file does not tell is drawn.
func TestReadRequests(t *testing.T) {
	dir := t.TempDir()
	drawn := kindOf(load.Span{Min: 1, Max: 1}, load.Span{Min: 30, Max: 30}, load.Span{Min: 7, Max: 7}, 64)
	read := func(text string) (*planned, error) {
		file := filepath.Join(dir, "requests")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return readRequests(file, drawn, load.Span{Min: 1, Max: 1}, 64)
	}
	p, err := read("# seconds, text, answer, pictures\n0 100 50 2\n1, 10, 5, 0\n4\n")
	if err != nil || math.Abs(p.rate-0.5) > 1e-9 || !p.pictures {
		t.Fatalf("%+v, %v", p, err)
	}
	want := map[time.Duration]simulate.Request{ // by the gap before
		1 * time.Second:         {Pictures: 2, Visual: 64, Prompt: 228, Output: 50},
		500 * time.Millisecond:  {Visual: 64, Prompt: 10, Output: 5},
		1500 * time.Millisecond: {Pictures: 1, Visual: 64, Prompt: 94, Output: 7},
	}
	last := time.Duration(0)
	for _, r := range p.draw(3, 3000) {
		gap := r.Arrive - last
		last, r.Arrive = r.Arrive, 0
		if w := want[gap.Round(time.Microsecond)]; !reflect.DeepEqual(r, w) {
			t.Fatalf("after %v comes %+v, want %+v", gap, r, w)
		}
	}
	if math.Abs(last.Seconds()-3000) > 100 {
		t.Errorf("3000 requests take %v at one a second", last)
	}
	p, err = read(`{"input_lens": [100, 200, 300], "output_lens": [10, 20, 30], "errors": ["", "late", ""], "start_times": [0, 1, 5]}`)
	if err != nil || math.Abs(p.rate-0.2) > 1e-9 {
		t.Fatalf("%+v, %v", p, err)
	}
	for _, r := range p.draw(1, 10) {
		if r.Prompt != 10*r.Output || r.Pictures != 1 || r.Prompt == 200 {
			t.Errorf("%+v", r)
		}
	}
	// vllm's have no times.
	if p, err = read(`{"input_lens": [100, 200], "output_lens": [10, 20]}`); err != nil || p.rate != 0 {
		t.Fatalf("%+v, %v", p, err)
	}
	all := p.draw(5, 20_000)
	if mean := all[len(all)-1].Arrive.Seconds() / 20_000; math.Abs(mean-1) > 0.03 {
		t.Errorf("one comes each %g s", mean)
	}
	for _, bad := range []string{"", "0\n", "soon\n1\n", "0 1 2 3 4\n1\n", "0 -1\n1\n", "{", `{"input_lens": [1]}`} {
		if _, err := read(bad); !errors.Is(err, ErrUsage) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// The demand of a running system is what all gateways have counted between two questions.
func TestRunning(t *testing.T) {
	url := bustest.Run(t).URL()
	if _, err := running(t.Context(), url, time.Millisecond); err == nil || !strings.Contains(err.Error(), "no gateway") {
		t.Errorf("%v", err)
	}
	for _, name := range []string{"gateway-1", "gateway-2"} {
		b, err := bus.Connect(t.Context(), url, name, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(b.Close)
		var asked atomic.Uint64
		_, err = b.Handle(wire.SubjectStats, func(_ []byte, respond func(any) error) {
			n := 1000 + asked.Add(1) // 1 request in between, with three pictures, at one of them
			d := &wire.Demand{Requests: n, PromptTokens: 40 * n, Ended: n, Lengths: 100 * n}
			if name == "gateway-1" {
				d.Pictured, d.Pictures, d.PictureTokens, d.PromptTokens = n, 3*n, 192*n, 232*n
			}
			if err := respond(wire.Stats{Instance: name, Role: "gateway", Demand: d}); err != nil {
				t.Error(err)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_ = b.Announce(t.Context(), func() wire.Instance { return wire.Instance{ID: name, Role: "gateway", Ready: true} })
		}()
		all, err := b.Gateways(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(time.Minute); !slices.ContainsFunc(all.All(), func(i wire.Instance) bool { return i.ID == name }); {
			if time.Now().After(deadline) {
				t.Fatalf("no heartbeat of %s", name)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	p, err := running(t.Context(), url, 10*time.Millisecond)
	if err != nil || !p.pictures || !strings.Contains(p.what, "50% with 3.0 pictures of 64 tokens, 40 tokens of text, answers of 100") {
		t.Fatalf("%+v, %v", p, err)
	}
	pictured := 0
	for _, r := range p.draw(1, 1000) {
		if r.Output != 100 || r.Prompt != 40+64*r.Pictures || r.Pictures != 0 && r.Pictures != 3 {
			t.Fatalf("%+v", r)
		}
		if r.Pictures > 0 {
			pictured++
		}
	}
	if pictured < 400 || pictured > 600 {
		t.Errorf("%d of 1000 have pictures", pictured)
	}
	if text := (&Plan{}).Help(); !strings.Contains(text, "--from-running") {
		t.Error(text)
	}
}
