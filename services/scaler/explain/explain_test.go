package explain_test

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"trireme.dev/services/scaler/explain"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/wire"
)

func change() autoscale.Change {
	return autoscale.Change{Action: autoscale.Widen, Stage: autoscale.Prefill, Instance: "prefill-0", Node: "n", Roles: "P", Numbers: []int{3}, NPUs: 2}
}

func decision(id string) explain.Decision {
	effect := autoscale.Effect{Utilisation: [3]float64{0.1, 0.7, 0.2}, NPUs: 4}
	d := autoscale.Decision{
		Now: time.Minute, Change: change(), Why: "prefill needs 1.4 NPUs and has 1: widen prefill-0 to 2 NPUs",
		Inputs: autoscale.Inputs{
			NPUs: 3, Spare: 3, TTFT: 0.5, TPOT: -1, Utilisation: [3]float64{0.1, 1.4, 0.2},
			Stages: [3]autoscale.StageInputs{{NPUs: 1, Need: 0.1, AtMost: true}, {NPUs: 1, Need: 1.4, Demand: 180, Capacity: 130, Backlog: 50}, {NPUs: 1, Unknown: true}},
		},
		Alternatives: []autoscale.Alternative{
			{Change: change(), Effect: effect, Cost: autoscale.Cost{Time: 2 * time.Second}, Score: 4.1},
			{Change: autoscale.Change{Action: autoscale.Remove, Instance: "encoder-0"}, Refused: "encode would have 0 NPUs", Score: 9},
		},
		LeftOut: 3,
	}
	var queues [3]autoscale.Queue
	queues[autoscale.Prefill] = autoscale.Queue{Pending: 4, InWork: 3, Waiting: 2, Oldest: 1500 * time.Millisecond}
	return explain.Decision{Queues: queues, Ages: explain.Ages{Demand: 3 * time.Millisecond, Instances: -1}, ID: id, Scaler: "s", Mode: autoscale.Auto, Decision: d, Before: explain.Measured{NPUs: 3, Need: [3]float64{0.1, 1.4, 0.2}, TTFT: 0.5, TPOT: -1}}
}

func outcome(id string, now float64) explain.Outcome {
	d := decision(id)
	return explain.Outcome{
		ID: id, Scaler: "s", Change: change(), Made: true, Took: 1500 * time.Millisecond, After: 20 * time.Second,
		Expected: &d.Decision.Alternatives[0].Effect, Before: &d.Before,
		Measured: &explain.Measured{NPUs: 4, Spare: 2, Need: [3]float64{0.1, 2 * now, 0.2}, Utilisation: [3]float64{0.1, now, 0.2}, TTFT: 0.95, TPOT: -1},
	}
}

// numbered are events as a reader gets them.
func numbered(events ...wire.Event) []wire.Event {
	for i := range events {
		events[i].Sequence, events[i].Time = uint64(10+i), time.Unix(int64(1e9+i), 0)
	}
	return events
}

func TestFind(t *testing.T) {
	t.Parallel()
	report := func(id string) wire.Event {
		data, err := json.Marshal(wire.ChangeReport{ID: id})
		if err != nil {
			t.Fatal(err)
		}
		return wire.Event{Kind: wire.EventScaleDone, Data: data}
	}
	events := numbered(
		explain.DecisionEvent(decision("aaa")), report("aaa1"), report("other"), explain.OutcomeEvent(outcome("aaa", 0.7)),
		explain.DecisionEvent(decision("bbb")), explain.OutcomeEvent(outcome("gone", 0.7)),
	)
	for which, want := range map[string]string{"": "bbb", "aaa": "aaa", "10": "aaa", "13": "aaa", "14": "bbb", "bbb": "bbb"} {
		s, err := explain.Find(events, which)
		if err != nil || s.Decision.ID != want {
			t.Fatalf("%q: %+v, %v", which, s, err)
		}
		if has := s.Outcome != nil; has != (want == "aaa") || has && (s.Outcome.ID != "aaa" || len(s.Events) != 1 || s.Events[0].Sequence != 11) {
			t.Errorf("%q: %+v", which, s)
		}
	}
	if s, err := explain.Find(events, "gone"); err != nil || s.Decision != nil || s.Outcome == nil {
		t.Errorf("a decision that is not kept: %+v, %v", s, err)
	}
	for _, which := range []string{"ccc", "99", "11"} {
		if _, err := explain.Find(events, which); !errors.Is(err, explain.ErrUnknown) {
			t.Errorf("%q: %v", which, err)
		}
	}
	if _, err := explain.Find(nil, ""); !errors.Is(err, explain.ErrUnknown) || !strings.Contains(err.Error(), "decided nothing yet") {
		t.Errorf("without events: %v", err)
	}
}

// A story has what was seen, thought about, chosen, and what came of it.
func TestStory(t *testing.T) {
	t.Parallel()
	late := outcome("id", 1.3)
	drift := outcome("id", 0.7)
	drift.Measured.Need[1], drift.Measured.Utilisation[1] = 0.5, 0.25
	failed := explain.Outcome{ID: "id", Change: change(), Why: "no memory", Took: time.Second}
	succeeded := outcome("id", 0.7)
	succeeded.Succeeded, succeeded.Expected, succeeded.Before, succeeded.Scaler = true, nil, nil, "s2"
	narrowed := outcome("id", 0.2)
	narrowed.Change.Action = autoscale.Narrow
	advice := decision("id")
	advice.Advice = "trireme scale prefill-0 2"
	tell := func(d explain.Decision, o *explain.Outcome) string {
		t.Helper()
		events := []wire.Event{explain.DecisionEvent(d)}
		if o != nil {
			events = append(events, explain.OutcomeEvent(*o))
		}
		s, err := explain.Find(numbered(events...), "")
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		if err := s.Write(&b); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	fast := decision("id")
	fast.Decision.Inputs.Stages[1].Capacity = 13904.2
	unknown := decision("id")
	unknown.Decision.Inputs.TTFT, unknown.Decision.Inputs.TPOT = -1, -1
	for what, want := range map[string][]string{
		tell(decision("id"), nil): {
			"Decision id, event 10", "3 NPUs with instances, 3 spare; 50% of requests met the target of TTFT", "180 prompt tokens/s", "not known", "at most 0.10",
			"widen prefill-0 to 2 NPUs", "encode would have 0 NPUs", "and 3 more", "What was chosen: widen prefill-0", "it is not known yet",
			"4 pending, 3 in work, 2 at the entrance, the oldest for 1.5s", "demand 3ms old, queues 0s old, instances not known",
		},
		tell(fast, nil):    {"13904"},
		tell(unknown, nil): {"3 spare; whether requests met their targets lately is not known."},
		tell(decision("id"), new(outcome("id", 0.72))): {"made in 1.5s; 20s later 72% of what prefill is sized for is asked of it, as expected", "expected", "measured", "95%"},
		tell(decision("id"), &late):                    {"130% of what prefill is sized for", "expected were 70%: it needs 2.6 NPUs now and 1.4 then"},
		tell(decision("id"), &drift):                   {"it needs 0.5 NPUs now and 1.4 then"},
		tell(decision("id"), &narrowed):                {"20% of what prefill is sized for is asked of it, at most 70% were expected"},
		tell(decision("id"), &failed):                  {"was not made after 1s: no memory"},
		tell(decision("id"), &succeeded):               {"s2 has brought it to its end"},
		tell(advice, nil):                              {"It is advice. To do it: trireme scale prefill-0 2", "the scaler does nothing about advice"},
	} {
		for _, w := range want {
			if !strings.Contains(what, w) {
				t.Errorf("%q is not told in\n%s", w, what)
			}
		}
	}
}

// An event that would be lost for its size leaves out the worst alternatives, and says so.
func TestEventsAreSmallEnough(t *testing.T) {
	t.Parallel()
	d := decision("id")
	wide := d.Decision.Alternatives[0]
	wide.Change.Numbers = make([]int, 6000)
	d.Decision.Alternatives = slices.Repeat([]autoscale.Alternative{wide}, 8)
	e := explain.DecisionEvent(d)
	if _, data, err := e.Message(); err != nil {
		t.Fatalf("%d bytes: %v", len(data), err)
	}
	var read explain.Decision
	if err := json.Unmarshal(e.Data, &read); err != nil {
		t.Fatal(err)
	}
	if n := len(read.Decision.Alternatives); n < 1 || n > 7 || n+read.Decision.LeftOut != 8+3 {
		t.Errorf("%d alternatives, %d left out", n, read.Decision.LeftOut)
	}
	if len(d.Decision.Alternatives) != 8 {
		t.Error("the caller's decision was changed")
	}
}

func TestCommand(t *testing.T) {
	t.Parallel()
	v := &autoscale.View{Instances: []autoscale.Instance{
		{Name: "decoder-0", Node: "n", Roles: "D", NPUs: []int{0}}, {Name: "decoder-1", Node: "n", Roles: "D", NPUs: []int{1}},
		{Name: "decoder-2", Node: "n", Roles: "D"}, {Name: "decoder-0", Node: "m", Roles: "D", NPUs: []int{0}},
	}}
	for _, c := range []struct {
		change autoscale.Change
		want   string
	}{
		{change(), "trireme scale prefill-0 2"},
		{autoscale.Change{Action: autoscale.Move, Node: "n", Roles: "P", From: "decoder-0", Instance: "prefill-0", Numbers: []int{4, 5}},
			"trireme role n/4 prefill --instance prefill-0 && trireme role n/5 prefill --instance prefill-0"},
		{autoscale.Change{Action: autoscale.Move, Node: "n", Roles: "D", From: "prefill-0", FromNPUs: 1, Numbers: []int{4}},
			"trireme scale prefill-0 1 && trireme scale decoder --replicas 3 --node n"},
		{autoscale.Change{Action: autoscale.Add, Node: "n", Roles: "D", Count: 2}, "trireme scale decoder --replicas 4 --node n"},
		{autoscale.Change{Action: autoscale.Remove, Node: "n", Roles: "D", Instance: "decoder-1"}, "trireme scale decoder --replicas 1 --node n"},
		{autoscale.Change{Action: autoscale.Rebalance, Instance: "decoder-1"}, "trireme rebalance decoder-1"},
		{autoscale.Change{Action: autoscale.None}, ""},
	} {
		if got := explain.Command(c.change, v); got != c.want {
			t.Errorf("%+v: %q, want %q", c.change, got, c.want)
		}
	}
}

func TestAges(t *testing.T) {
	t.Parallel()
	v := &autoscale.View{}
	if a := explain.AgesOf(v); a != (explain.Ages{Demand: -1, Queues: -1, Instances: -1}) {
		t.Errorf("%+v", a)
	}
	known := func(d time.Duration) autoscale.Signal { return autoscale.Signal{Known: true, Age: d} }
	v.Demand.Signal = known(3)
	for i := range v.Queues {
		v.Queues[i].Signal = known(time.Duration(5 - i))
	}
	v.Instances = []autoscale.Instance{{Signal: known(1)}, {Signal: known(8)}, {Signal: known(2)}}
	if a := explain.AgesOf(v); a != (explain.Ages{Demand: 3, Queues: 5, Instances: 8}) {
		t.Errorf("%+v", a)
	}
}
