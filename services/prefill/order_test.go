package prefill

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/runner"
	"trireme.dev/shared/wire"
)

// Which lanes are in a step, and how much of each: by what has begun, priority, tenant, and the policy, anew for each step. A
// long prompt keeps a short or urgent one waiting for a chunk, not for all of it.
func TestOrderOfLanes(t *testing.T) {
	target := func(left time.Duration) wire.Place { return wire.Place{Target: true, Left: left} }
	type prompt struct {
		tokens int
		place  wire.Place
		resume bool
		step   int // comes before this step
	}
	for name, c := range map[string]struct {
		policy  sched.Policy
		prompts []prompt // named a, b, c, …
		want    string   // lanes and tokens, step by step
	}{
		"who came first": {sched.FCFS, []prompt{{tokens: 25}, {tokens: 5}, {tokens: 8, place: wire.Place{Waited: time.Hour}, step: 1}},
			"a10, c8 a2, a10, a3 b5"},
		"the least that is left": {sched.SJF, []prompt{{tokens: 25}, {tokens: 8, step: 1}, {tokens: 13, step: 1}},
			"a10, b8 c2, c10, c1 a9, a6"},
		"who is due first": {sched.SLO, []prompt{{tokens: 15, place: target(3 * time.Hour)}, {tokens: 5}, {tokens: 12, place: target(time.Hour), step: 1}},
			"b5 a5, c10, c2 a8, a2"},
		"late ones go last": {sched.SLO, []prompt{{tokens: 15, place: target(-time.Hour)}, {tokens: 8, place: target(time.Hour)}, {tokens: 8}},
			"c8 b2, b6 a4, a10, a1"},
		"priorities": {sched.FCFS, []prompt{{tokens: 25}, {tokens: 12, place: wire.Place{Priority: -1}, step: 1}},
			"a10, b10, b2 a8, a7"},
		"tenants": {sched.FCFS, []prompt{{tokens: 30, place: wire.Place{Tenant: "x"}}, {tokens: 30, place: wire.Place{Tenant: "x"}},
			{tokens: 20, place: wire.Place{Tenant: "y"}}}, "a10, c10, a10, c10, a10, b10, b10, b10"},
		"answers that have begun": {sched.FCFS, []prompt{{tokens: 15}, {tokens: 9, resume: true, place: wire.Place{Priority: 5}}},
			"b8 a2, b1 a9, a4"},
	} {
		t.Run(name, func(t *testing.T) {
			p := &prefill{
				Stage: &stage.Stage{},
				epoch: time.Now().Add(-time.Minute), queue: sched.NewQueue(sched.Order{Policy: c.policy, Patience: time.Minute}), jobs: map[*job]bool{},
			}
			names := map[*lane]string{}
			var steps []string
			for n := 0; ; n++ {
				for i, q := range c.prompts {
					if q.step != n {
						continue
					}
					spec := &wire.Spec{Prompt: make([]int32, q.tokens), Choices: 1}
					if q.resume {
						spec.Prompt, spec.Resume = spec.Prompt[1:], [][]int32{{1}}
					}
					place := q.place
					place.Waited -= time.Duration(i) * time.Second // one came after the other
					j := &job{spec: spec, seat: &stage.Seat{}, claim: &hbm.Claim{}, place: place, rope: make([][3]int32, q.tokens), choices: []choice{{seq: &kv.Sequence{}}}}
					l := &lane{job: j, tokens: make([]int32, q.tokens)}
					names[l] = string(rune('a' + i))
					p.wait(l)
				}
				step := &runner.Step{Step: sched.NewStep(sched.Limits{Seqs: 8, Rows: 10}, placement.First(1))}
				step.Begin()
				before := map[*lane]int64{}
				for l := range names {
					before[l] = int64(len(l.tokens) - l.pos)
				}
				p.Form(step)
				if len(p.taken) == 0 {
					break
				}
				var line []string
				rows := step.Tokens()
				for _, l := range p.taken {
					chunk := min(rows, len(l.tokens)-l.pos)
					if prompt := len(l.job.spec.Prompt); l.pos < prompt {
						chunk = min(chunk, prompt-l.pos)
					}
					rows -= chunk
					l.pos += chunk
					if l.pos < len(l.tokens) {
						p.wait(l)
					}
					line = append(line, fmt.Sprint(names[l], chunk))
				}
				steps = append(steps, strings.Join(line, " "))
			}
			if got := strings.Join(steps, ", "); got != c.want {
				t.Errorf("the steps were %s, want %s", got, c.want)
			}
		})
	}
}

// A prompt for which its NPU has no room in a step keeps none from going on on another NPU, and keeps its place.
func TestOrderOnSeveralNPUs(t *testing.T) {
	p := &prefill{
		Stage: &stage.Stage{},
		epoch: time.Now().Add(-time.Minute), queue: sched.NewQueue(sched.Order{Policy: sched.FCFS, Patience: time.Minute}), jobs: map[*job]bool{},
	}
	add := func(npu, tokens int) {
		spec := &wire.Spec{Prompt: make([]int32, tokens), Choices: 1}
		j := &job{
			spec: spec, seat: &stage.Seat{NPU: npu}, claim: &hbm.Claim{}, rope: make([][3]int32, tokens), choices: []choice{{seq: &kv.Sequence{}}},
			place: wire.Place{Waited: -time.Duration(len(p.lanes)) * time.Second}, // one came after the other
		}
		l := &lane{job: j, tokens: spec.Prompt}
		p.lanes = append(p.lanes, l)
		p.wait(l)
	}
	add(1, 15)
	add(1, 3)
	add(0, 8)
	add(2, 12)
	for n, want := range [][]int{{15, 8, 12}, {15, 3, 12}} { // by their lengths
		step := &runner.Step{Step: sched.NewStep(sched.Limits{Seqs: 8, Rows: 10}, placement.First(3))}
		step.Begin()
		p.Form(step)
		room := [3]int{10, 10, 10}
		var got []int
		for _, l := range p.taken {
			chunk := min(room[l.job.seat.NPU], len(l.tokens)-l.pos)
			room[l.job.seat.NPU] -= chunk
			got = append(got, len(l.tokens))
			if l.pos += chunk; l.pos < len(l.tokens) {
				p.wait(l)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("step %d has the prompts of %v tokens, want %v", n+1, got, want)
		}
	}
}
