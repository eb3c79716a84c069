package sample

import (
	"math"
	"slices"
)

// Space is the scratch memory of sampling for one vocabulary. Samplers used by one goroutine may share a Space.
type Space struct {
	scores  []float32 // [vocab]: logits after bias, masks and penalties
	scaled  []float32 // [vocab]: scores over the temperature
	weights []float64 // [vocab]: e^(scaled - largest); 0: cut off
	order   []int32   // [vocab]: a heap of ids
	largest []float32 // the k largest
	top     []TokenLogprob
}

// NewSpace returns scratch for a vocabulary. Memory for random draws is taken at the first one.
func NewSpace(vocab int) *Space { return &Space{scores: make([]float32, vocab)} }

// prepareDraw takes the memory that only random draws need.
func (sp *Space) prepareDraw() {
	if sp.weights == nil {
		n := len(sp.scores)
		sp.scaled, sp.weights, sp.order = make([]float32, n), make([]float64, n), make([]int32, 0, n)
	}
}

// argmax returns the lowest id of the largest score; NaN is never the largest.
func argmax(scores []float32) int32 {
	best, at := float32(math.Inf(-1)), 0
	for i, v := range scores {
		if v > best {
			best, at = v, i
		}
	}
	return int32(at)
}

// draw picks a token at the point u of the distribution that temperature, min-p, top-k and top-p leave of scores.
func (sp *Space) draw(scores []float32, p *Params, u float64) int32 {
	sp.prepareDraw()
	largest := float32(math.Inf(-1))
	scaled, weights := sp.scaled[:len(scores)], sp.weights[:len(scores)]
	for i, v := range scores {
		v /= p.Temperature
		scaled[i] = v
		largest = max(largest, v) // NaN if any is
	}
	if l := float64(largest); math.IsInf(l, 0) || math.IsNaN(l) { // all cut off, one certain beyond measure, or broken
		return argmax(scores)
	}
	floor := float32(math.Inf(-1))
	if p.TopK > 0 && p.TopK < len(scores) {
		floor = sp.kth(scaled, p.TopK)
	}
	for i, v := range scaled {
		weights[i] = 0
		if v >= floor {
			if w := exp(float64(v) - float64(largest)); w >= float64(p.MinP) {
				weights[i] = w
			}
		}
	}
	if p.TopP > 0 && p.TopP < 1 {
		sp.nucleus(scaled, weights, float64(p.TopP))
	}
	total := 0.0
	for _, w := range weights {
		total += w
	}
	target, sum, last := float64(u*total), 0.0, int32(0)
	for i, w := range weights {
		if w == 0 {
			continue
		}
		last = int32(i)
		if sum += w; sum > target {
			break
		}
	}
	return last
}

// kth returns the k-th largest of v, by a heap of the k largest with the smallest on top.
func (sp *Space) kth(v []float32, k int) float32 {
	h := sp.largest[:0]
	if cap(h) < k {
		h = make([]float32, 0, k)
	}
	h = append(h, v[:k]...)
	sp.largest = h
	for i := k/2 - 1; i >= 0; i-- {
		siftSmall(h, i)
	}
	for _, x := range v[k:] {
		if x > h[0] {
			h[0] = x
			siftSmall(h, 0)
		}
	}
	return h[0]
}

// siftSmall moves h[i] down until no child is smaller.
func siftSmall(h []float32, i int) {
	for {
		child := 2*i + 1
		if child >= len(h) {
			return
		}
		if child+1 < len(h) && h[child+1] < h[child] {
			child++
		}
		if h[i] <= h[child] {
			return
		}
		h[i], h[child] = h[child], h[i]
		i = child
	}
}

// nucleus zeroes the weights outside the smallest set of most likely tokens (lower id first among equals) that hold
// topP of the total.
func (sp *Space) nucleus(scaled []float32, weights []float64, topP float64) {
	h, total := sp.order[:0], 0.0
	for i, w := range weights {
		if w > 0 {
			h = append(h, int32(i))
			total += w
		}
	}
	for i := len(h)/2 - 1; i >= 0; i-- {
		siftLikely(h, scaled, i)
	}
	need, sum := float64(topP*total), 0.0
	for len(h) > 0 {
		sum += weights[h[0]]
		h[0] = h[len(h)-1]
		h = h[:len(h)-1]
		siftLikely(h, scaled, 0)
		if sum >= need {
			break
		}
	}
	for _, id := range h {
		weights[id] = 0
	}
}

// before says whether token a ranks before b by score, the lower id first among equals.
func before(scores []float32, a, b int32) bool {
	return scores[a] > scores[b] || scores[a] == scores[b] && a < b
}

// siftLikely moves h[i] down until no child ranks before it.
func siftLikely(h []int32, scores []float32, i int) {
	for {
		child := 2*i + 1
		if child >= len(h) {
			return
		}
		if child+1 < len(h) && before(scores, h[child+1], h[child]) {
			child++
		}
		if !before(scores, h[child], h[i]) {
			return
		}
		h[i], h[child] = h[child], h[i]
		i = child
	}
}

// logSum returns the logarithm of the sum of e^logits.
func logSum(logits []float32) float64 {
	largest := float64(logits[argmax(logits)])
	sum := 0.0
	for _, v := range logits {
		sum += exp(float64(v) - largest)
	}
	return largest + math.Log(sum)
}

// mostLikely returns the n largest logits as logprobs, the largest first, the lower id first among equals. The result
// is valid until the next call.
func (sp *Space) mostLikely(logits []float32, n int, norm float64) []TokenLogprob {
	n = min(n, len(logits))
	top := slices.Grow(sp.top[:0], n)[:0]
	for i, v := range logits {
		if math.IsNaN(float64(v)) || len(top) == n && v <= top[n-1].Logprob {
			continue
		}
		at := len(top)
		if len(top) < n {
			top = top[:at+1]
		} else {
			at--
		}
		for at > 0 && v > top[at-1].Logprob {
			top[at] = top[at-1]
			at--
		}
		top[at] = TokenLogprob{Token: int32(i), Logprob: v}
	}
	for i := range top {
		top[i].Logprob = float32(float64(top[i].Logprob) - norm)
	}
	sp.top = top
	return top
}
