package signals

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/wire"
)

const (
	// patience is how long answers are waited for. Who answers later is heard in the next round.
	patience = 400 * time.Millisecond
	// whole is how many rounds apart all of patience is waited for HMMs, as one of a node without instances may be new.
	whole = 10
	// startersAge is how old the word may be of whether somebody starts processes on a node.
	startersAge = 5 * time.Second
	// plansAge is how old the word may be of what a rebalance would bring: to plan one is work for the instance.
	plansAge = 30 * time.Second
	// unbalanced is the balance below which it is asked for.
	unbalanced = 0.9
)

// Asker asks everybody for what a Book wants to hear. It is for one goroutine.
type Asker struct {
	Anywhere bool // for Heard; before the first Ask

	bus   *bus.Bus
	beats *bus.Instances
	log   *slog.Logger
	clock func() time.Duration

	rounds   int
	nodes    map[string]bool // that have answered
	starters map[string]bool
	looked   time.Time // for starters

	mu      sync.Mutex // of plans
	plans   map[string]plan
	rebuild sync.WaitGroup
}

type plan struct {
	at      time.Time
	balance float64 // 0: it has not answered
}

// NewAsker watches the heartbeats until ctx ends. Clock says what time it is for Heard.At.
func NewAsker(ctx context.Context, b *bus.Bus, clock func() time.Duration, log *slog.Logger) (*Asker, error) {
	beats, err := b.Instances(ctx)
	if err != nil {
		return nil, err
	}
	return &Asker{bus: b, beats: beats, log: log, clock: clock, nodes: map[string]bool{}, starters: map[string]bool{}, plans: map[string]plan{}}, nil
}

// Ask asks once, and returns within half a second or so, or when ctx ends.
func (a *Asker) Ask(ctx context.Context) *Heard {
	h := &Heard{At: a.clock(), Instances: a.beats.Named()}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var asking sync.WaitGroup
	asking.Go(func() { h.Stats = a.stats(ctx, h.Instances) })
	asking.Go(func() { h.Nodes = a.hmms(ctx, h.Instances) })
	asking.Go(func() {
		queues, err := a.bus.Queues(ctx)
		if err != nil {
			a.log.Debug("reading the queues", "error", err)
			return
		}
		h.Queues = queues
	})
	if time.Since(a.looked) > startersAge {
		asking.Go(func() { a.look(ctx, h.Instances) })
	}
	asking.Wait()
	a.rounds++
	h.Starters, h.Anywhere = maps.Clone(a.starters), a.Anywhere
	h.Planned = a.planned(h.Instances, h.Stats)
	return h
}

// Wait returns when nothing that was asked in the background is open any more.
func (a *Asker) Wait() { a.rebuild.Wait() }

// stats asks gateways and stages.
func (a *Asker) stats(ctx context.Context, beats []wire.Instance) []wire.Stats {
	all, err := a.bus.Stats(ctx, beats)
	if err != nil {
		a.log.Debug("asking for stats", "error", err)
	}
	return all
}

// hmms asks the HMMs.
func (a *Asker) hmms(ctx context.Context, beats []wire.Instance) (all []hbm.Stats) {
	awaited := maps.Clone(a.nodes)
	for _, i := range beats {
		if i.Role != "gateway" {
			awaited[i.Node] = true
		}
	}
	wait := a.rounds%whole == 0
	err := a.bus.AskAll(ctx, wire.SubjectHMM, struct{}{}, func(data []byte) bool {
		if len(data) == 0 {
			return false
		}
		var s hbm.Stats
		if err := json.Unmarshal(data, &s); err != nil {
			a.log.Debug("an HMM's answer is ignored", "error", err)
			return true
		}
		all = append(all, s)
		delete(awaited, s.Node)
		return len(awaited) > 0 || wait
	})
	if err != nil {
		a.log.Debug("asking the HMMs", "error", err)
	}
	clear(a.nodes) // one that is gone is not waited for again
	for i := range all {
		a.nodes[all[i].Node] = true
	}
	return all
}

// look finds out on which nodes somebody starts processes, by asking for as many as there are.
func (a *Asker) look(ctx context.Context, beats []wire.Instance) {
	ask := map[string]wire.Replicas{}
	for _, i := range beats {
		if i.Role == "gateway" || len(i.NPUs) == 0 || i.Name == "" {
			continue
		}
		r, ok := ask[i.Node]
		if !ok {
			r = wire.Replicas{Roles: letters(i.Role), Check: true}
		}
		if r.Roles == letters(i.Role) {
			r.Count++
		}
		ask[i.Node] = r
	}
	for node, r := range ask {
		var report wire.ReplicasReport
		err := a.bus.Ask(ctx, wire.SubjectReplicas(node), &r, &report)
		switch {
		case err == nil:
			a.starters[node] = true
		case errors.Is(err, nats.ErrNoResponders):
			delete(a.starters, node)
		default: // nobody knows: as it was
			a.log.Debug("asking who starts processes", "node", node, "error", err)
		}
	}
	if ctx.Err() == nil && len(ask) > 0 {
		a.looked = time.Now()
	}
}

// planned says what rebalances would bring, as far as that was asked for and answered lately, and asks instances of which NPUs wait for
// one another, in the background.
func (a *Asker) planned(beats []wire.Instance, stats []wire.Stats) map[string]float64 {
	waits := map[string]bool{}
	for i := range stats {
		if w := stats[i].Work; w != nil && w.Rows > 0 && len(w.NPUs) > 1 && w.Balance < unbalanced {
			waits[stats[i].Instance] = true
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	known := map[string]float64{}
	for _, i := range beats {
		p, asked := a.plans[i.ID]
		fresh := asked && time.Since(p.at) < plansAge
		switch {
		case !waits[i.ID]:
			continue
		case fresh && p.balance > 0:
			known[i.ID] = p.balance
		case !fresh && i.Ready && i.Changing == "":
			a.plans[i.ID] = plan{at: time.Now()}
			a.rebuild.Go(func() { a.plan(i) })
		}
	}
	maps.DeleteFunc(a.plans, func(_ string, p plan) bool { return time.Since(p.at) > 2*plansAge })
	return known
}

// plan asks an instance what a rebalance would bring.
func (a *Asker) plan(i wire.Instance) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	r, err := a.bus.Change(ctx, i.ID, i.Record(), wire.Change{
		ID: bus.NewChangeID(), Kind: wire.ChangeRebalance, Left: 5 * time.Second, Spare: wire.DefaultSpare, Slack: wire.DefaultSlack, DryRun: true,
	}, nil)
	if err != nil {
		a.log.Debug("asking what a rebalance would bring", "instance", i.ID, "error", fmt.Sprint(err))
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.plans[i.ID] = plan{time.Now(), r.Plan.Will}
}
