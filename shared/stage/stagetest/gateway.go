package stagetest

import (
	"fmt"
	"slices"
	"sync"

	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// Gateway is the test's gateway: it takes tokens in order, confirms what it has, and keeps what was lost. Fields may be
// changed with Set.
type Gateway struct {
	ID    string
	Deaf  bool                 // answers no Confirm
	Quiet bool                 // sends no Resend for a gap
	Lose  func(*wire.Run) bool // true: this run does not arrive
	Over  func(choice int) bool
	// Unheard is how many words of lost attempts it does not get.
	Unheard int
	Without bool // has no request any more

	r       *Rig
	mu      sync.Mutex
	answers map[choiceKey]*Answer
	lost    []wire.Lost
	leave   []func() error
}

type choiceKey struct {
	request string
	choice  int
}

// Answer is what a gateway has of a choice.
type Answer struct {
	IDs      []int32
	Logprobs []wire.Logprob
	Finish   wire.Finish // as told with the last token
	Runs     []wire.Run  // all that arrived, in order
	Confirms int         // questions so far
	Ended    bool        // an end was confirmed
}

// Gateway starts a gateway.
func (r *Rig) Gateway() *Gateway {
	r.tb.Helper()
	r.gateways++
	g := &Gateway{ID: fmt.Sprintf("gateway%d", r.gateways), r: r, answers: map[choiceKey]*Answer{}}
	g.Return()
	return g
}

// Return lets a gateway listen again after Leave.
func (g *Gateway) Return() {
	r := g.r
	r.tb.Helper()
	for subject, f := range map[string]func([]byte, func(any) error){
		wire.SubjectTokens(g.ID):  g.tokens,
		wire.SubjectConfirm(g.ID): g.confirm,
		wire.SubjectLost(g.ID): func(data []byte, respond func(any) error) {
			var m wire.Lost
			if err := wire.Unmarshal(data, &m); err != nil {
				r.tb.Errorf("gateway: %v", err)
			}
			unheard, without := false, false
			g.Set(func() {
				without = g.Without
				if unheard = g.Unheard > 0; unheard {
					g.Unheard--
					return
				}
				if !slices.Contains(g.lost, m) { // else an answer was slow, and it is told once more
					g.lost = append(g.lost, m)
				}
			})
			if unheard {
				return
			}
			if err := respond(&wire.Confirmed{Ended: without}); err != nil {
				r.tb.Errorf("gateway: %v", err)
			}
		},
	} {
		sub, err := r.Bus.Handle(subject, f)
		if err != nil {
			r.tb.Fatal(err)
		}
		g.leave = append(g.leave, sub.Unsubscribe)
	}
}

// Leave ends the gateway: nobody listens at its subjects.
func (g *Gateway) Leave() {
	g.r.tb.Helper()
	for _, f := range g.leave {
		if err := f(); err != nil {
			g.r.tb.Fatal(err)
		}
	}
	g.leave = nil
	if err := g.r.Bus.Conn().Flush(); err != nil {
		g.r.tb.Fatal(err)
	}
}

// Set changes fields.
func (g *Gateway) Set(f func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f()
}

func (g *Gateway) answer(request string, choice int) *Answer {
	k := choiceKey{request, choice}
	if g.answers[k] == nil {
		g.answers[k] = &Answer{}
	}
	return g.answers[k]
}

func (g *Gateway) tokens(data []byte, _ func(any) error) {
	var m wire.Tokens
	if err := wire.Unmarshal(data, &m); err != nil {
		g.r.tb.Errorf("gateway: %v", err)
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := range m.Items {
		if run := &m.Items[i]; g.Lose == nil || !g.Lose(run) {
			g.take(m.Instance, run)
		}
	}
}

// take takes the next tokens of a choice. Those that are there already must be the same.
func (g *Gateway) take(instance string, run *wire.Run) {
	a := g.answer(run.Request, run.Choice)
	a.Runs = append(a.Runs, *run)
	if run.Index > len(a.IDs) {
		if !g.Quiet {
			m := wire.Resend{Request: run.Request, Choice: run.Choice, From: len(a.IDs)}
			if err := g.r.Bus.Send(wire.SubjectResend(instance), &m); err != nil {
				g.r.tb.Errorf("gateway: %v", err)
			}
		}
		return
	}
	known := min(len(run.IDs), len(a.IDs)-run.Index)
	if !slices.Equal(run.IDs[:known], a.IDs[run.Index:run.Index+known]) {
		g.r.tb.Errorf("gateway: tokens from %d on of %s/%d were %v, now %v", run.Index, run.Request, run.Choice,
			a.IDs[run.Index:run.Index+known], run.IDs)
	}
	a.IDs = append(a.IDs, run.IDs[known:]...)
	if run.Logprobs != nil {
		a.Logprobs = append(a.Logprobs, run.Logprobs[known:]...)
	}
	if run.Finish != wire.FinishNone {
		a.Finish = run.Finish
	}
}

func (g *Gateway) confirm(data []byte, respond func(any) error) {
	var m wire.Confirm
	if err := wire.Unmarshal(data, &m); err != nil {
		g.r.tb.Errorf("gateway: %v", err)
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if m.Request == "" { // whether it is there
		if err := respond(&wire.Confirmed{}); err != nil {
			g.r.tb.Errorf("gateway: %v", err)
		}
		return
	}
	a := g.answer(m.Request, m.Choice)
	a.Confirms++
	if g.Deaf {
		return
	}
	c := wire.Confirmed{Next: len(a.IDs), Over: g.Without || g.Over != nil && g.Over(m.Choice), Ended: g.Without}
	if m.Finish != wire.FinishNone && m.Next == len(a.IDs) {
		a.Ended, a.Finish = true, m.Finish
	}
	if err := respond(&c); err != nil {
		g.r.tb.Errorf("gateway: %v", err)
	}
}

// Have gives a gateway the tokens that a client has of an earlier attempt.
func (g *Gateway) Have(request string, choice int, ids []int32) {
	g.Set(func() {
		a := g.answer(request, choice)
		a.IDs = append(slices.Clone(ids), a.IDs[min(len(a.IDs), len(ids)):]...)
	})
}

// Answer is a copy of what the gateway has of a choice.
func (g *Gateway) Answer(request string, choice int) Answer {
	g.mu.Lock()
	defer g.mu.Unlock()
	a := *g.answer(request, choice)
	a.IDs, a.Runs, a.Logprobs = slices.Clone(a.IDs), slices.Clone(a.Runs), slices.Clone(a.Logprobs)
	return a
}

// Until waits until the gateway's answer is as ok wants it, and returns it.
func (g *Gateway) Until(what, request string, choice int, ok func(*Answer) bool) Answer {
	g.r.tb.Helper()
	var a Answer
	g.r.Until(what, func() bool {
		a = g.Answer(request, choice)
		return ok(&a)
	}, func() string {
		waiting, taken := g.r.Queue(stage.Decode)
		return fmt.Sprintf("%d tokens, %d messages, %d questions, lost %v; %d decode messages wait, %d are in work; HMM: %+v",
			len(a.IDs), len(a.Runs), a.Confirms, g.lost, waiting, taken, g.r.Stats())
	})
	return a
}

// Ended waits for a confirmed end.
func (g *Gateway) Ended(request string, choice int) Answer {
	g.r.tb.Helper()
	return g.Until("the end is confirmed", request, choice, func(a *Answer) bool { return a.Ended })
}

// Tokens waits for at least n tokens.
func (g *Gateway) Tokens(request string, choice, n int) Answer {
	g.r.tb.Helper()
	return g.Until("tokens arrive", request, choice, func(a *Answer) bool { return len(a.IDs) >= n })
}

// Lost waits for n attempts to be lost and returns them.
func (g *Gateway) Lost(n int) []wire.Lost {
	g.r.tb.Helper()
	var lost []wire.Lost
	g.r.Until("the attempt is lost", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		lost = slices.Clone(g.lost)
		return len(lost) >= n
	})
	return lost
}

// NothingLost checks that no attempt was given up.
func (g *Gateway) NothingLost() {
	g.r.tb.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.lost) > 0 {
		g.r.tb.Errorf("lost: %+v", g.lost)
	}
}
