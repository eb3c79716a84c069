package sched

import "math/bits"

// Load is what an instance has in work.
type Load struct {
	Pictures  int // to be encoded
	Prompts   int // to be computed
	Sequences int // that decode
}

// The levels at which instances ask for work: the one at the lowest is given the next piece.
const (
	LevelIdle = 0 // nothing in work
	LevelMost = 9
)

// queued are the levels of instances by what a new picture or prompt would have before it, in thirds of a picture or prompt:
// each is the most that counts as this level. So few levels tell one from two, and need not tell ten from eleven.
var queued = [LevelMost]int{0, 1, 2, 4, 5, 8, 11, 17, 29}

// LevelToCompute is the level at which an instance asks for pictures and prompts. Those that it has already go before a new one;
// sequences that decode only make it slower, a little, and one more or less of them does not matter. onward says that the instance
// does the next stage of a request, too: of idle ones it goes first, as what it makes of a picture or a prompt need not travel
// then. While it has anything else in work, one for this stage alone that is idle goes before it.
func (l Load) LevelToCompute(onward bool) int {
	ahead := 3 * (l.Pictures + l.Prompts)
	if l.Sequences > 0 {
		ahead += 2
	}
	if !onward {
		ahead++
	}
	for level, most := range queued {
		if ahead <= most {
			return level
		}
	}
	return LevelMost
}

// chunkWeight is how many sequences that decode beside it a prompt or picture counts for a sequence: its chunks and blocks make
// every gap between tokens longer.
const chunkWeight = 4

// LevelToDecode is the level at which an instance asks for sequences. It doubles from one to the next: sequences of a step share
// its fixed part, which is most of it.
func (l Load) LevelToDecode() int {
	return min(bits.Len(uint(l.Sequences+chunkWeight*(l.Pictures+l.Prompts))), LevelMost)
}

// Batch is how many pieces of work an instance asks for at once that has some already and room for more: no more than it has, so
// that one that comes first to a queue does not empty it while others are idle; and that is how many make it busier by a level
// or so.
func Batch(has, room int) int { return min(room, max(1, has)) }
