package act_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/hmm"
	"trireme.dev/services/scaler/act"
	"trireme.dev/services/scaler/lead"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/sched/autoscale"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// rest is a role that gets no messages.
type rest struct{}

func (rest) Handle(context.Context, *bus.Delivery) {}
func (rest) Close()                                {}

// A real instance changes at a scaler's word: once under an id, also when it is asked again, and not at the word of one that does not lead.
func TestInPlace(t *testing.T) {
	r := stagetest.New(t, func(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
		return hmm.Run(ctx, hmm.Config{Socket: socket, Node: "n", NPUs: 4, NPUBytes: 1 << 20, HostBytes: 1 << 20, NATS: conn}, log)
	}, stagetest.Long)
	r.Stage.Name = "decoder-0"
	s, _ := r.Open(stage.Decode, func(ctx context.Context, s *stage.Stage) error {
		return s.Serve(ctx, stage.Role{Name: stage.Decode, Slots: 1, Start: func(*stage.Stage) (stage.Worker, error) { return rest{}, nil }})
	})
	// An actuator waits for instances that are not there: for one that is about to show itself long, for one that never comes not.
	actuator := func(wait time.Duration) act.Actuator {
		a, err := act.New(t.Context(), act.Config{Bus: r.Bus, Processes: act.Up, Wait: wait})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	a := actuator(time.Minute)
	tm, end := term(t, r.Bus, "one")
	key := wire.LayoutKey("n", "decoder-0")
	record := func() *wire.Layout {
		l, _, err := r.Bus.Layout(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	do := func(id string, c autoscale.Change) act.Outcome {
		t.Helper()
		c.Node = "n"
		out, err := a.Do(t.Context(), tm, &lead.Operation{ID: id, Change: c})
		if err != nil {
			t.Fatalf("%s: %v", id, err)
		}
		return out
	}
	taken := r.HBM.NPUs()[0]
	mine := s.NPUs()[0].Number
	var spare []int
	for n := range 4 {
		if n != taken && n != mine {
			spare = append(spare, n)
		}
	}
	widen := autoscale.Change{Action: autoscale.Widen, Instance: "decoder-0", Numbers: spare}
	if out := do("a", widen); !out.Done || len(out.Reports) != 1 || !out.Reports[0].Committed {
		t.Fatalf("widen: %+v", out)
	}
	if l := record(); l.Epoch != 1 || wire.NPUCount(l.NPUs) != 3 || !l.Is("ax0") {
		t.Errorf("the record is %+v", l)
	}
	if out := do("a", widen); !out.Done || record().Epoch != 1 {
		t.Errorf("asked again: %+v; epoch %d", out, record().Epoch)
	}
	if out := do("b", autoscale.Change{Action: autoscale.Widen, Instance: "decoder-0", Numbers: []int{taken}}); out.Done || !strings.Contains(out.Why, "is to join") {
		t.Errorf("an NPU that another one has: %+v", out)
	}
	// Somebody has seen a fence from before NATS lost its store: who leads gets a greater one.
	if _, err := r.Bus.Change(t.Context(), s.ID, key, wire.Change{ID: "z", Kind: wire.ChangeScale, NPUs: 3, Left: time.Minute, Fence: 1000}, nil); err != nil {
		t.Fatal(err)
	}
	narrow := autoscale.Change{Action: autoscale.Narrow, Instance: "decoder-0", Numbers: spare[1:]}
	if out := do("c", narrow); !out.Done || tm.Fence() <= 1000 {
		t.Errorf("narrow: %+v, with fence %d", out, tm.Fence())
	}
	if l := record(); wire.NPUCount(l.NPUs) != 2 || slices.Contains(l.NPUs, spare[1]) {
		t.Errorf("the record is %+v", l)
	}
	if out := do("d", autoscale.Change{Action: autoscale.Rebalance, Instance: "decoder-0"}); !out.Done {
		t.Errorf("rebalance: %+v", out)
	}
	patient := a
	a = actuator(100 * time.Millisecond)
	if out := do("e", autoscale.Change{Action: autoscale.Move, From: "decoder-0", Instance: "prefill-0", Numbers: spare[:1]}); out.Done ||
		!strings.Contains(out.Why, fmt.Sprintf("NPUs n/%d left decoder-0 and joined nobody", spare[0])) || len(out.Reports) != 1 {
		t.Errorf("a move to an instance that is not there: %+v", out)
	}
	a = patient
	if out := do("f", autoscale.Change{Action: autoscale.Remove, Roles: "D", Instance: "decoder-0"}); out.Done || !strings.Contains(out.Why, "nobody starts or stops processes on node n") {
		t.Errorf("remove where no `trireme up` is: %+v", out)
	}
	if out := do("g", autoscale.Change{Action: "sing"}); out.Done || !strings.Contains(out.Why, "sing") {
		t.Errorf("what nobody knows: %+v", out)
	}
	epoch := record().Epoch
	end()
	out, err := a.Do(t.Context(), tm, &lead.Operation{ID: "h", Change: autoscale.Change{Action: autoscale.Widen, Node: "n", Instance: "decoder-0", Numbers: spare[1:]}})
	if err == nil || record().Epoch != epoch {
		t.Errorf("behind the end of the term: %+v, %v, epoch %d", out, err, record().Epoch)
	}
}

// Where nobody changes the number of processes the command is told, and what is done in place is done.
func TestAdvice(t *testing.T) {
	r := connect(t, bustest.Run(t).URL())
	view, err := r.Instances(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"x", "y", "standby"} {
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = r.Announce(ctx, func() wire.Instance {
				i := wire.Instance{ID: id, Node: "n", Role: "decode", Ready: true, NPUs: []int{1}}
				if id == "standby" {
					i.NPUs, i.Standby = nil, true
				}
				return i
			})
		}()
		t.Cleanup(func() { cancel(); <-ended })
	}
	for deadline := time.Now().Add(time.Minute); len(view.All()) < 3 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	for _, processes := range []act.Processes{act.Advise, act.Auto} {
		a, err := act.New(t.Context(), act.Config{Bus: r, Processes: processes, Cluster: act.Cluster{Targets: map[string]string{"PD": "llm"}}})
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range []struct {
			change autoscale.Change
			want   string
		}{
			{autoscale.Change{Action: autoscale.Add, Roles: "D", Count: 2}, "docker compose up -d --no-recreate --scale decoder=4"},
			{autoscale.Change{Action: autoscale.Remove, Roles: "D", Instance: "y"}, "docker compose up -d --no-recreate --scale decoder=1"},
			{autoscale.Change{Action: autoscale.Add, Roles: "EPD", Count: 1}, "docker compose up -d --no-recreate --scale encoder=1 # if encoder is the service that runs EPD: scaler run --target EPD=SERVICE names another one"},
			{autoscale.Change{Action: autoscale.Add, Roles: "PD", Count: 1}, "docker compose up -d --no-recreate --scale llm=1"},
			{autoscale.Change{Action: autoscale.Move, Roles: "P", From: "x"}, "docker compose up -d --no-recreate --scale prefill=1"},
			{autoscale.Change{Action: autoscale.Move, Roles: "P", From: "x", Instance: "p"}, ""},
			{autoscale.Change{Action: autoscale.Widen, Instance: "x"}, ""},
		} {
			x.change.Node = "n"
			if advice, ok := a.Able(t.Context(), x.change); advice != x.want || ok != (x.want == "") {
				t.Errorf("%s, %s: %q, %v; want %q", processes, x.change.Sentence(), advice, ok, x.want)
			}
		}
	}
	wrong := act.Cluster{Targets: map[string]string{"PD": "deployments/llm"}}
	if _, err := act.New(t.Context(), act.Config{Bus: r, Processes: act.Advise, Cluster: wrong}); err == nil {
		t.Error("a Deployment passes for a service of docker compose")
	}
	if _, err := act.New(t.Context(), act.Config{Bus: r, Processes: "cook"}); err == nil {
		t.Error("there is a way called cook")
	}
}
