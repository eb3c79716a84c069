package stage

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// Each step of a script does something and says who may work then: the crowd (*), a suspect, or nobody.
func TestTurns(t *testing.T) {
	for name, script := range map[string]string{
		"one suspect":                "* ; join a: a ; leave a: *",
		"joining twice":              "join a: a ; join a: a ; leave a: * ; leave a: *",
		"the crowd stops first":      "enter: * ; enter: * ; join a: - ; exit: - ; exit: a ; leave a: *",
		"in order, with a breath":    "join a: a ; join b: a ; leave a: * ; round: * ; round: b ; leave b: *",
		"a breath that takes longer": "join a: a ; join b: a ; leave a: * ; enter: * ; round: * ; round: - ; exit: b",
		"who never had its turn":     "enter: * ; join a: - ; join b: - ; leave a: - ; exit: b",
		"who leaves from behind":     "join a: a ; join b: a ; leave b: a ; leave a: *",
		"the line ends in a breath":  "join a: a ; join b: a ; leave a: * ; leave b: * ; join c: c",
	} {
		t.Run(name, func(t *testing.T) {
			var tr turns[string]
			for i, step := range strings.Split(script, ";") {
				do, want, found := strings.Cut(strings.TrimSpace(step), ": ")
				if !found {
					do, want = "", do
				}
				verb, who, _ := strings.Cut(do, " ")
				switch verb {
				case "join":
					tr.join(who)
				case "leave":
					tr.leave(who)
				case "enter":
					tr.crowd++
				case "exit":
					tr.crowd--
				case "round":
					tr.round()
				}
				got := "-"
				if tr.open() {
					got = "*"
				}
				for _, k := range []string{"a", "b", "c"} {
					if tr.may(k) {
						if got != "-" {
							t.Fatalf("step %d: %s and %s may both work", i, got, k)
						}
						got = k
					}
				}
				if got != want {
					t.Fatalf("step %d, %q: %s may work, want %s", i, do, got, want)
				}
			}
		})
	}
}

// Whatever comes and goes, a suspect works alone, and neither the crowd nor a suspect waits for ever.
func TestTurnsStarveNobody(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var tr turns[int]
		next := 0
		var waiting []int // suspects in order of arrival
		crowdRounds := 0  // since a suspect has ended
		ended := 0
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			switch rapid.SampledFrom([]string{"join", "enter", "exit", "work", "round"}).Draw(t, "step") {
			case "join":
				tr.join(next)
				waiting = append(waiting, next)
				next++
			case "enter":
				if tr.open() {
					tr.crowd++
				}
			case "exit":
				tr.crowd = max(0, tr.crowd-1)
			case "round":
				if tr.open() {
					crowdRounds++
				}
				tr.round()
			case "work": // whoever may, to its end
				for i, k := range slices.Clone(waiting) {
					if !tr.may(k) {
						continue
					}
					switch {
					case tr.open() || tr.crowd > 0:
						t.Fatal("a suspect is not alone")
					case i != 0:
						t.Fatalf("suspect %d goes before %d", k, waiting[0])
					case ended > 0 && crowdRounds == 0:
						t.Fatal("two suspects one after the other without a round of the crowd")
					}
					tr.leave(k)
					waiting = waiting[1:]
					ended, crowdRounds = ended+1, 0
					if len(waiting) == 0 {
						ended = 0 // nobody waits: what comes next need not wait either
					}
					break
				}
			}
		}
		// When nothing new comes, everybody gets its turn.
		tr.crowd = 0
		for range breathRounds*len(waiting) + len(waiting) + breathRounds {
			tr.round()
			if len(waiting) > 0 && tr.may(waiting[0]) {
				tr.leave(waiting[0])
				waiting = waiting[1:]
			}
		}
		if len(waiting) > 0 || !tr.open() {
			t.Fatal(fmt.Sprint(waiting, " still wait"))
		}
	})
}
