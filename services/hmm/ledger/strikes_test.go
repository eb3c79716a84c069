package ledger_test

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"trireme.dev/shared/hbm/protocol"

	"trireme.dev/services/hmm/ledger"
)

// struck is a ledger with its board.
type struck struct {
	t     testing.TB
	l     *ledger.Ledger
	board map[int]uint64
}

func newStruck(t testing.TB) *struck {
	s := &struck{t: t, board: map[int]uint64{}}
	cfg := config()
	cfg.Slots = 64
	cfg.Board = func(slot int) uint64 { return s.board[slot] }
	s.l = ledger.New(cfg)
	return s
}

func (s *struck) claim(worker ledger.Conn, p protocol.Part) protocol.Claimed {
	s.t.Helper()
	got, err := s.l.Claim(start, worker, protocol.Claim{Part: p})
	must(s.t, err)
	return got
}

func (s *struck) says(c protocol.Claimed, running bool, reached uint32) {
	s.board[c.Slot] = protocol.Progress{Running: running, Reached: reached}.Word(c.Generation)
}

func part(request string, attempt, n int) protocol.Part {
	return protocol.Part{Request: request, Attempt: attempt, Stage: "encode", Part: n}
}

// Each line is a delivery: what its worker says and how it ends, and the strikes and the reach that the next one is told.
func TestStrikes(t *testing.T) {
	type delivery struct {
		running bool
		reached uint32
		end     string // dies, leaves, gives up, is taken over
		attempt int    // 0: 1

		strikes int
		before  uint32
	}
	for name, script := range map[string][]delivery{
		"dies at once": {
			{running: true, end: "dies", strikes: 1}, {running: true, end: "dies", strikes: 2},
			{running: true, end: "dies", strikes: 3}, {running: true, end: "dies", strikes: 4},
		},
		"dies at the same place": {
			{running: true, reached: 5, end: "dies", before: 5}, {running: true, reached: 5, end: "dies", strikes: 1, before: 5},
			{running: true, reached: 4, end: "dies", strikes: 2, before: 5}, {running: true, reached: 6, end: "dies", before: 6},
		},
		"waits while others run": {{reached: 0, end: "dies"}, {reached: 0, end: "dies"}},
		"progress clears":        {{running: true, end: "dies", strikes: 1}, {running: true, reached: 1, end: "gives up", before: 1}},
		"a stop is no death":     {{running: true, end: "leaves"}, {running: true, end: "is taken over"}, {running: true, end: "gives up"}},
		"strikes outlast a stop": {{running: true, end: "dies", strikes: 1}, {running: true, end: "leaves", strikes: 1}},
		"a newer attempt keeps strikes and starts anew": {
			{running: true, reached: 3, end: "dies", before: 3}, {running: true, end: "dies", strikes: 1, before: 3},
			{attempt: 2, running: true, end: "dies", strikes: 2}, {attempt: 2, running: true, reached: 1, end: "dies", before: 1},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStruck(t)
			next := connect(t, s.l, "first")
			got := s.claim(next, part("r", 1, 0))
			if got.Strikes != 0 || got.Reached != 0 {
				t.Fatalf("the first claim is told %+v", got)
			}
			for i, d := range script {
				attempt := max(d.attempt, 1)
				if i > 0 && attempt > max(script[i-1].attempt, 1) {
					got = s.claim(next, part("r", attempt, 0))
				}
				s.says(got, d.running, d.reached)
				worker := next
				switch d.end {
				case "dies":
					s.l.Died(worker)
				case "leaves":
					s.l.Disconnect(worker)
				case "gives up":
					must(t, s.l.Unclaim(worker, protocol.Unclaim{Part: part("r", attempt, 0), Generation: got.Generation}))
				}
				if i%2 == 0 { // as when a sibling has the message delivered again
					s.l.Orphans("encode")
				}
				next = connect(t, s.l, "next")
				got = s.claim(next, part("r", attempt, 0))
				if got.Strikes != d.strikes || got.Reached != d.before {
					t.Fatalf("after delivery %d: %d strikes and reach %d, want %d and %d", i, got.Strikes, got.Reached, d.strikes, d.before)
				}
			}
			must(t, s.l.End(start, "r"))
		})
	}
}

// A word that another claim's holder has left in the slot says nothing of this one.
func TestStrikesOfAnotherClaim(t *testing.T) {
	s := newStruck(t)
	a := connect(t, s.l, "a")
	old := s.claim(a, part("old", 1, 0))
	s.says(old, true, 9)
	must(t, s.l.Unclaim(a, protocol.Unclaim{Part: part("old", 1, 0), Generation: old.Generation}))
	got := s.claim(a, part("r", 1, 0))
	if got.Slot != old.Slot {
		t.Fatal("the slot is not used again: the test tests nothing")
	}
	s.l.Died(a)
	if got := s.claim(connect(t, s.l, "b"), part("r", 1, 0)); got.Strikes != 0 || got.Reached != 0 {
		t.Errorf("told of %+v", got)
	}
}

// Workers that run what has no strike together and what has one alone find the killers, each after the same number of
// deaths, and never take anybody for one that only ran beside them.
func TestOnlyKillersAreQuarantined(t *testing.T) {
	const quarantine = 1 + 3 // one death in company or alone, three more alone
	rapid.Check(t, func(t *rapid.T) {
		s := newStruck(nil)
		n := rapid.IntRange(1, 12).Draw(t, "requests")
		kills := make([]uint32, n) // pieces after which a request kills, 0: never
		for i := range kills {
			if rapid.IntRange(0, 3).Draw(t, "killer") == 0 {
				kills[i] = rapid.Uint32Range(1, 4).Draw(t, "where")
			}
		}
		const pieces = 5 // of a request
		deaths := make([]int, n)
		open := make([]bool, n)
		for i := range open {
			open[i] = true
		}
		of := func(i int) protocol.Part { return part(fmt.Sprint("r", i), 1, 0) }
		for worker := 0; slices.Contains(open, true); worker++ {
			if worker > 1000 {
				t.Fatal("it does not come to an end")
			}
			id, _, err := s.l.Connect(start, protocol.Hello{Instance: "w", Role: "encode"})
			if err != nil {
				t.Fatal(err)
			}
			claims := map[int]protocol.Claimed{}
			var together, alone []int
			for i := range n {
				if !open[i] || rapid.IntRange(0, 3).Draw(t, "elsewhere") == 0 {
					continue
				}
				claims[i], err = s.l.Claim(start, id, protocol.Claim{Part: of(i)})
				switch c := claims[i]; {
				case err != nil:
					t.Fatal(err)
				case c.Strikes >= quarantine:
					if kills[i] == 0 {
						t.Fatalf("request %d is quarantined, and kills nobody", i)
					}
					if deaths[i] < quarantine {
						t.Fatalf("request %d is quarantined after %d deaths", i, deaths[i])
					}
					open[i] = false
				case c.Strikes > 0:
					alone = append(alone, i)
				default:
					together = append(together, i)
				}
			}
			dead := false
			run := func(batch []int) {
				at := map[int]uint32{}
				for len(batch) > 0 && !dead {
					for _, i := range batch {
						s.says(claims[i], true, at[i])
					}
					// One of the batch goes on, or the step kills: those before it in the step have not been told of.
					for _, i := range batch {
						if kills[i] != 0 && at[i]+1 == kills[i] {
							dead = true
							for _, j := range batch {
								deaths[j]++
							}
							return
						}
					}
					for _, i := range batch {
						at[i]++
						s.says(claims[i], true, at[i])
						if at[i] == pieces {
							open[i] = false
						}
					}
					batch = slices.DeleteFunc(batch, func(i int) bool { return !open[i] })
				}
			}
			for _, i := range alone {
				if !dead {
					run([]int{i})
				}
				if !dead {
					s.says(claims[i], false, 0)
				}
			}
			if !dead {
				run(together)
			}
			if !dead && rapid.Bool().Draw(t, "stops") {
				s.l.Disconnect(id)
			} else {
				s.l.Died(id)
			}
			s.l.Orphans("encode")
		}
		for i := range n {
			if kills[i] != 0 && deaths[i] > quarantine+n+int(kills[i]) {
				t.Fatalf("request %d was run to death %d times", i, deaths[i])
			}
		}
	})
}
