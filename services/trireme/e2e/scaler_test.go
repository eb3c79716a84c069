package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/openai/openai-go/v3"

	"trireme.dev/services/scaler/explain"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

// scaled starts a cluster with a scaler whose NPUs are slow at prompts, and without caches, so that each prompt is work. It records.
func scaled(t *testing.T, topology, policy string, args ...string) (c *cluster, file, record string) {
	t.Helper()
	dir := t.TempDir()
	write := func(name, text string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	profile := write("slow.yaml", "name: slow\nsource: this test\nencode: {picture_ms: 5}\nprefill: {step_ms: 5, token_ms: 1}\ndecode: {step_ms: 30}\n")
	file, record = write("scaler.yaml", policy), filepath.Join(dir, "record")
	settings := write("settings.yaml", "scaler:\n  run:\n    record: "+record+"\n    settle: 2s\n")
	return start(t, append([]string{
		"--topology", topology, "--threads", "1", "--pace", profile, "--kv-cache", "0", "--mm-cache", "0", "--config", settings, "--scaler", "auto",
		"--scaler-policy", file,
	}, args...)...), file, record
}

// scalerStatus is what the scaler says of itself; a zero one when none answers.
func (c *cluster) scalerStatus(tb testing.TB) (s explain.Status) {
	tb.Helper()
	var all []explain.Status
	if err := json.Unmarshal(c.command(tb, "scaler", "status", "--json", "--nats-url", "nats://"+c.nats), &all); err != nil {
		tb.Fatal(err)
	}
	if len(all) > 0 {
		s = all[0]
	}
	return s
}

// command runs a command that must succeed, and returns its output.
func (c *cluster) command(tb testing.TB, args ...string) []byte {
	tb.Helper()
	path, err := binary()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := exec.Command(path, args...).Output()
	if err != nil {
		tb.Fatalf("%v: %v\n%s", args, err, out)
	}
	return out
}

// awaitTurns waits until the scaler has decided so often more, knowing what it does.
func (c *cluster) awaitTurns(tb testing.TB, more uint64) {
	tb.Helper()
	var s explain.Status
	from := c.scalerStatus(tb).Turns
	c.await(tb, fmt.Sprintf("the scaler has decided %d times more", more), func() bool {
		s = c.scalerStatus(tb)
		return s.Leads && s.Turns >= from+more && !s.Decision.Blind
	}, func() string { return fmt.Sprintf("%+v\n%s", s, c.log) })
}

// decisions are those that the scaler has told, and their outcomes as far as there are any.
func (c *cluster) decisions(tb testing.TB) (decisions []explain.Decision, outcomes []explain.Outcome) {
	tb.Helper()
	for _, e := range c.events(tb, "--kind", "scaler", "--all") {
		var d explain.Decision
		var o explain.Outcome
		switch {
		case e.Kind == wire.EventScalerDecision && json.Unmarshal(e.Data, &d) == nil:
			decisions = append(decisions, d)
		case e.Kind == wire.EventScalerOutcome && json.Unmarshal(e.Data, &o) == nil:
			outcomes = append(outcomes, o)
		}
	}
	return decisions, outcomes
}

// awaitOutcome waits for a change that was made and measured, of an instance.
func (c *cluster) awaitOutcome(tb testing.TB, action autoscale.Action, instance string) (d explain.Decision, o explain.Outcome) {
	tb.Helper()
	var all []explain.Decision
	var outcomes []explain.Outcome
	c.await(tb, fmt.Sprintf("the scaler has made and measured a %s of %s", action, instance), func() bool {
		all, outcomes = c.decisions(tb)
		for _, o = range outcomes {
			if o.Change.Action != action || o.Change.Instance != instance || !o.Made || o.Measured == nil {
				continue
			}
			for _, d = range all {
				if d.ID == o.ID {
					return true
				}
			}
		}
		return false
	}, func() string { return fmt.Sprintf("%+v\n%+v\n%+v\n%s", all, outcomes, c.scalerStatus(tb), c.log) })
	return d, o
}

// prompted makes requests of which the prompt is nearly all the work.
func prompted(tb testing.TB, i int) openai.ChatCompletionNewParams {
	tb.Helper()
	return openai.ChatCompletionNewParams{
		Model:     "shapes-vl-moe",
		Messages:  []openai.ChatCompletionMessageParamUnion{openai.UserMessage(strings.Repeat(fmt.Sprintf("Count from %d to %d. ", i, i+7), 20))},
		MaxTokens: openai.Int(40),
	}
}

// briskly is a policy under which prefill soon gets an NPU: it is short of them long before it cannot do more, where the need that is sure comes
// near to that only slowly. And they are soon taken away again: with targets that were missed they would be kept for a minute.
const briskly = "targets: {ttft: 30s, tpot: 1s}\nstages: {prefill: {utilisation: 0.5}}\nshrink: {window: 5s, cooldown: 1s}\n"

// Nothing arrives: nothing is done. Then more than a prefill NPU bears: it gets a spare one, while answers stay the same. Then nothing
// again: the NPU is spare again, and that is all. Events tell it, explain tells why, and a replay of the record decides the same.
func TestScalerWidensAndNarrows(t *testing.T) {
	t.Parallel()
	const widenAndNarrow = briskly + "actions: [widen, narrow]\n"
	c, file, record := scaled(t, "1E1P1D+1", widenAndNarrow)
	c.awaitTurns(t, 8) // longer than all windows
	if d, _ := c.decisions(t); len(d) > 0 {
		t.Errorf("nothing has arrived, and it was decided: %+v", d)
	}
	l := newLoadOf(t, c, prompted)
	l.begin()
	defer l.stop.Store(true)
	d, o := c.awaitOutcome(t, autoscale.Widen, "prefill-0")
	if d.Mode != autoscale.Auto || d.Advice != "" || d.Decision.Inputs.Stages[autoscale.Prefill].Need <= 1 || len(d.Decision.Alternatives) == 0 ||
		o.Expected == nil || o.Expected.NPUs != o.Measured.NPUs || o.Measured.Stage[autoscale.Prefill] < 2 || o.Measured.Busy[autoscale.Prefill] <= 0 {
		t.Errorf("%+v\n%+v", d, o)
	}
	t.Logf("%s: %s", d.Decision.Why, o.Sentence())
	story := string(c.command(t, "explain", d.ID, "--nats-url", "nats://"+c.nats))
	for _, want := range []string{"Decision " + d.ID, "What was chosen: widen prefill-0", wire.EventScaleCommit, "made in", "measured"} {
		if !strings.Contains(story, want) {
			t.Errorf("explain does not tell %q:\n%s", want, story)
		}
	}
	l.end(t)
	// What has arrived is forgotten slowly; an NPU that may be busy all the time bears it sooner.
	if err := os.WriteFile(file, []byte(strings.Replace(widenAndNarrow, "0.5", "1", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	c.awaitOutcome(t, autoscale.Narrow, "prefill-0")
	c.expectNPUs(t, "encoder-0 1", "prefill-0 1", "decoder-0 1")
	before, _ := c.decisions(t)
	c.awaitTurns(t, 8)
	if after, _ := c.decisions(t); len(after) != len(before) {
		t.Errorf("nothing arrives any more, all stages have one NPU, and it was decided: %+v", after[len(before):])
	}
	if c.metric(t, "trireme_request_restarts_total") != 0 {
		t.Error("requests were started again")
	}
	// A policy that cannot be used is refused, and one that can is in force, without a restart.
	for text, want := range map[string]func(explain.Status) bool{
		"budget: many": func(s explain.Status) bool { return strings.Contains(s.Refused, "many") },
		"band: 0.3":    func(s explain.Status) bool { return s.Refused == "" && s.Policy == file },
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c.await(t, text, func() bool { return want(c.scalerStatus(t)) }, c.log.String)
	}
	if told := c.events(t, "--kind", wire.EventScalerPolicy); len(told) == 0 {
		t.Error("no event tells of the policy")
	}
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	said, err := exec.Command(path, "scaler", "replay", record).CombinedOutput()
	if err != nil || !strings.Contains(string(said), "; 0 are not as recorded") || !strings.Contains(string(said), "widen prefill-0") {
		t.Errorf("replay: %v\n%s", err, said)
	}
}

// Without spare NPUs a decoder with more than it needs gives one to prefill.
func TestScalerMovesAnNPU(t *testing.T) {
	t.Parallel()
	c, _, _ := scaled(t, "1E1P1Dx2", briskly+"actions: [move]\n")
	l := newLoadOf(t, c, prompted)
	l.begin()
	defer l.stop.Store(true)
	d, o := c.awaitOutcome(t, autoscale.Move, "prefill-0")
	t.Logf("%s: %s", d.Decision.Why, o.Sentence())
	c.expectNPUs(t, "encoder-0 1", "prefill-0 2", "decoder-0 1")
	l.end(t)
	c.expectNoMemory(t)
	if c.metric(t, "trireme_request_restarts_total") != 0 {
		t.Error("requests were started again")
	}
}
