package simulate

import (
	"math/rand/v2"
	"time"
)

// Kind is what requests of a load are like. Ranges have both ends, and each value is as likely.
type Kind struct {
	Pictures [2]int
	Visual   int // multimodal tokens of each picture
	Words    [2]int
	Output   [2]int
}

func (k *Kind) draw(r *rand.Rand, at time.Duration) Request {
	of := func(s [2]int) int { return s[0] + r.IntN(s[1]-s[0]+1) }
	q := Request{Arrive: at, Pictures: of(k.Pictures), Visual: k.Visual, Output: of(k.Output)}
	q.Prompt = q.Pictures*q.Visual + of(k.Words)
	return q
}

// Phase is a part of a load.
type Phase struct {
	Length time.Duration
	// Rate is requests a second at a time since the phase began, at most Peak; arrivals are Poisson's.
	Rate func(since time.Duration) float64
	Peak float64
	Kind Kind
}

// Steady is a rate that stays as it is.
func Steady(rate float64) (func(time.Duration) float64, float64) {
	return func(time.Duration) float64 { return rate }, rate
}

// Draw is a load of phases, one after the other: Poisson arrivals whose rate changes, by thinning (Lewis and Shedler 1979).
func Draw(seed uint64, phases []Phase) (load []Request, length time.Duration) {
	r := rand.New(rand.NewPCG(seed, 0xa7))
	for _, p := range phases {
		if p.Peak > 0 {
			for at := time.Duration(0); ; {
				at += time.Duration(r.ExpFloat64() / p.Peak * float64(time.Second))
				if at >= p.Length {
					break
				}
				if r.Float64()*p.Peak < p.Rate(at) {
					load = append(load, p.Kind.draw(r, length+at))
				}
			}
		}
		length += p.Length
	}
	return load, length
}
