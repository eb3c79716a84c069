package protocol

// Progress is what the holder of a claim says about its work, in the word of the board that has the number of the claim's
// slot: the HMM reads it when the holder has died. Stores of a holder that has lost its claim meanwhile may be found there, too;
// they are told by their generation.
type Progress struct {
	Running bool   // the part is being worked on, and would be the cause if the process died; not: it only waits
	Reached uint32 // how far the work has come that the stage counts: pieces, tokens. 0: nowhere yet
}

// A word has, from the top: Running (1 bit), the low 31 bits of the claim's generation, and Reached (32 bits).
const (
	runningBit     = 1 << 63
	generationMask = 1<<31 - 1
)

// Word encodes p for a claim.
func (p Progress) Word(generation uint64) uint64 {
	w := generation&generationMask<<32 | uint64(p.Reached)
	if p.Running {
		w |= runningBit
	}
	return w
}

// ParseProgress reads a word as that of a claim: zero if it is of another one.
func ParseProgress(word, generation uint64) Progress {
	if word>>32&generationMask != generation&generationMask {
		return Progress{}
	}
	return Progress{Running: word&runningBit != 0, Reached: uint32(word)}
}
