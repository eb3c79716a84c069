package stage

import "slices"

// turns decides who of a process may work now: all that have no strike together, the crowd, or one suspect alone. A suspect
// that comes has everybody else stop where they can be stopped, and begins when they have; the next one begins when the crowd
// has had a round in between, so that neither starves. It is a pure state machine; gate puts it to use.
type turns[K comparable] struct {
	crowd  int  // works of the crowd that cannot be stopped now
	line   []K  // suspects, in order of arrival: the first one's turn it is, once the crowd has stopped
	had    bool // the first one has had its turn
	breath int  // rounds left to the crowd before the first of the line
}

// breathRounds is how many ends of a round the crowd waits for: the end of the one in which the suspect has ended, and of a whole one.
const breathRounds = 2

// open reports whether the crowd may work.
func (t *turns[K]) open() bool { return len(t.line) == 0 || t.breath > 0 }

// join puts a suspect into the line, and reports whether it was not there.
func (t *turns[K]) join(k K) bool {
	if slices.Contains(t.line, k) {
		return false
	}
	t.line = append(t.line, k)
	return true
}

// may reports whether it is a suspect's turn.
func (t *turns[K]) may(k K) bool {
	if len(t.line) == 0 || t.line[0] != k || t.breath > 0 || t.crowd > 0 {
		return false
	}
	t.had = true
	return true
}

// leave takes a suspect out of the line, and reports whether it was there.
func (t *turns[K]) leave(k K) bool {
	i := slices.Index(t.line, k)
	if i < 0 {
		return false
	}
	t.line = slices.Delete(t.line, i, i+1)
	if i == 0 && t.had {
		t.had = false
		if len(t.line) > 0 {
			t.breath = breathRounds
		}
	}
	if len(t.line) == 0 {
		t.breath = 0
	}
	return true
}

// round is the end of a round of the runner. It reports whether the crowd has less time left than before.
func (t *turns[K]) round() bool {
	if t.breath == 0 {
		return false
	}
	t.breath--
	return true
}
