package autoscale

import (
	"maps"
	"math"
	"slices"
	"time"
)

// capacity is what an NPU can do, as measured. What was measured once holds until something else is.
type capacity struct {
	rate    [Stages]float64 // units in a second of computing; 0: not known
	steps   map[int]step    // how long decoding steps take, by batch
	visual  float64         // multimodal tokens of a picture
	prompt  float64         // tokens of a prompt
	perHead float64         // pictures of a request
	kvBatch float64         // sequences for which an NPU has KV memory; 0: not known
	held    held            // when the entrance held requests back for want of KV memory
}

// held is that requests wait at the entrance for KV memory, of which each has to be given what it may come to need.
type held struct {
	at    time.Duration
	known bool
	batch float64 // sequences on an NPU that were let in then
}

// heldMemory is how long that counts: what requests may come to need changes with what they are like.
const heldMemory = 2 * time.Minute

// crowd is how much of decoders' KV memory is at least in use when requests are held back for it: what is set aside for the rest of
// answers is not in use yet.
const crowd = 0.4

type step struct {
	took time.Duration // the average of the last few
	at   time.Duration // when one was seen last
}

// stepMemory is how long a step's time counts: contexts grow and shrink, and step times with them.
const stepMemory = 2 * time.Minute

// least is the busy share from which on a rate is a measurement, and not what two pictures happened to take.
const least = 0.02

func (c *capacity) see(v *View, arriving amounts) {
	if c.steps == nil {
		c.steps = map[int]step{}
	}
	var sum, weight [Stages]float64
	var sequences, full float64
	for k := range v.Instances {
		i := &v.Instances[k]
		for s := range Stages {
			if w := i.Busy * float64(len(i.NPUs)); i.Rate[s] > 0 && i.Busy >= least && i.Has(Stage(s)) {
				sum[s] += w * i.Rate[s]
				weight[s] += w
			}
		}
		for _, st := range i.Steps {
			if st.Batch < 1 || st.Took <= 0 {
				continue
			}
			old, ok := c.steps[st.Batch]
			if took := st.Took; ok && v.Now-old.at < stepMemory {
				old.took += (took - old.took) / 4
			} else {
				old.took = took
			}
			old.at = v.Now
			c.steps[st.Batch] = old
		}
		if i.Has(Decode) && i.Batch >= 4 && i.KV > 0.05 { // less says nothing about how many would fit
			sequences += float64(i.Batch)
			full += i.KV * float64(len(i.NPUs))
		}
	}
	for s := range Stages {
		if weight[s] > 0 {
			c.rate[s] = sum[s] / weight[s]
		}
	}
	if full > 0 {
		c.kvBatch = sequences / full
	}
	for batch, st := range c.steps {
		if v.Now-st.at > stepMemory && len(c.steps) > 1 {
			delete(c.steps, batch)
		}
	}
	if arriving[pictures] > 0 {
		c.visual = arriving[visual] / arriving[pictures]
	}
	if arriving[requests] > 0 {
		c.prompt = arriving[prompt] / arriving[requests]
		c.perHead = arriving[pictures] / arriving[requests]
	}
	if n := c.waiting(v); n > 0 {
		c.held = held{v.Now, true, float64(v.Queues[Decode].InWork) / float64(max(1, decoders(v)))}
	}
}

// waiting is how many requests wait at the entrance for KV memory, and not for their turn: the stages that come first have nothing in line.
func (c *capacity) waiting(v *View) float64 {
	e, p, d := &v.Queues[Encode], &v.Queues[Prefill], &v.Queues[Decode]
	if e.Waiting+p.Waiting == 0 || e.Pending+p.Pending > 0 || p.InWork > d.InWork/2 {
		return 0
	}
	var used, npus float64
	for k := range v.Instances {
		if i := &v.Instances[k]; i.Has(Decode) {
			used, npus = used+i.KV*float64(len(i.NPUs)), npus+float64(len(i.NPUs))
		}
	}
	if used < crowd*npus {
		return 0
	}
	n := float64(p.Waiting)
	if c.perHead > 0 {
		n = max(n, float64(e.Waiting)/c.perHead)
	}
	return n
}

// decoders is how many NPUs decode.
func decoders(v *View) (n int) {
	for k := range v.Instances {
		if i := &v.Instances[k]; i.Has(Decode) {
			n += len(i.NPUs)
		}
	}
	return n
}

// reach is how many times the largest batch that was seen a larger one may be predicted from.
const reach = 4

// batch is the largest number of sequences on an NPU with which steps take no longer than the target, and for which there is KV
// memory, and how long such a step takes; 0 when nothing is known. Step times are taken as affine in the batch (as DistServe's
// simulator has it, simdistserve); where only one batch was seen as proportional to it, which is never too few NPUs. AtMost says that it
// may be far too many: that batch does not take too long, and larger ones may take hardly longer.
func (c *capacity) batch(target time.Duration) (batch float64, took time.Duration, atMost bool) {
	if len(c.steps) == 0 {
		return 0, 0, false
	}
	var n, x, y, xx, xy, largest float64
	for _, b := range slices.Sorted(maps.Keys(c.steps)) { // in order: sums of floats depend on it
		bx, by := float64(b), c.steps[b].took.Seconds()
		n, x, y, xx, xy = n+1, x+bx, y+by, xx+bx*bx, xy+bx*by
		largest = max(largest, bx)
	}
	x, y = x/n, y/n
	at0, slope := 0.0, y/x
	if spread := xx/n - x*x; spread > 1e-9*(1+x*x) {
		slope = max(0, (xy/n-x*y)/spread)
		if at0 = y - slope*x; at0 < 0 { // the best line through 0
			at0, slope = 0, xy/xx
		}
	} else {
		atMost = y <= target.Seconds()
	}
	batch = reach * max(largest, 2)
	if slope > 0 {
		batch = min(batch, (target.Seconds()-at0)/slope)
	}
	if c.kvBatch > 0 {
		batch = min(batch, 0.9*c.kvBatch) // the last tenth is for those that grow
	}
	batch = max(1, math.Floor(batch))
	return batch, time.Duration((at0 + slope*batch) * float64(time.Second)), atMost
}

// pair is the number of NPUs that are sized to the policy's utilisation.
const pair = 2

// staff is how many NPUs so much work needs, itself in NPUs that compute all of the time. Chance evens out where there are many: what is
// needed beyond the work grows with its square root (Halfin and Whitt 1981), more where pieces of work come together. It is such that
// a pair of NPUs is utilised as wanted, and never less than that.
func staff(work, utilisation, together float64) float64 {
	beyond := math.Sqrt(pair*utilisation) * (1/utilisation - 1) // times the square root of the work of a pair
	return min(work/utilisation, work+beyond*math.Sqrt(work*together))
}

// need is how many NPUs each stage needs, by what arrives and by what waits.
func (c *capacity) need(v *View, p *Policy, arriving amounts, has [Stages]int) [Stages]StageInputs {
	var in [Stages]StageInputs
	for s := range Stages {
		in[s].NPUs = has[s]
	}
	forKV := c.waiting(v)
	waiting := func(s Stage) float64 {
		if forKV > 0 && s != Decode { // it is not for these that the entrance waits
			return float64(v.Queues[s].Pending)
		}
		return float64(v.Queues[s].Pending + v.Queues[s].Waiting)
	}
	for s, each := range [...]float64{Encode: c.visual, Prefill: c.prompt} {
		i := &in[s]
		i.Demand = arriving[[...]int{Encode: visual, Prefill: prompt}[s]]
		i.Backlog = waiting(Stage(s)) * each
		rate := c.rate[s]
		if rate <= 0 {
			i.Unknown = i.Demand+i.Backlog > 0
			continue
		}
		i.Capacity = rate * p.Utilisation[s]
		together := 1.0
		if Stage(s) == Encode {
			together = max(1, c.perHead)
		}
		if work := i.Demand / rate; work > 0 {
			i.Capacity = rate * work / staff(work, p.Utilisation[s], together)
		}
		// A queue is no backlog as long as it is short beside the target: with arrivals by chance there is always one now and then.
		allowed := rate * float64(has[s]) * p.Targets.TTFT.Seconds() / 4
		i.Need = i.Demand/i.Capacity + max(0, i.Backlog-allowed)/(rate*p.Drain.Seconds())
	}
	i := &in[Decode]
	i.Demand = arriving[output]
	i.Backlog = waiting(Decode) + forKV
	sequences := float64(v.Queues[Decode].InWork) + i.Backlog
	batch, took, atMost := c.batch(p.Targets.TPOT)
	if batch == 0 {
		i.Unknown = i.Demand+sequences > 0
		return in
	}
	if c.held.known && v.Now-c.held.at < heldMemory && c.held.batch >= 1 && c.held.batch < batch {
		took = time.Duration(float64(took) * c.held.batch / batch) // not more than that
		batch = c.held.batch
	}
	i.Batch = int(batch)
	i.Capacity = p.Utilisation[Decode] * batch / took.Seconds()
	// By what arrives (Little's law), and by what is there: those sequences stay for the length of an answer.
	i.Need = max(i.Demand/i.Capacity, sequences/batch)
	if atMost {
		i.AtMost, i.Need = true, min(i.Need, float64(has[Decode]))
	}
	return in
}
