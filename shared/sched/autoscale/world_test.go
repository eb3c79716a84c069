package autoscale_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"pgregory.net/rapid"

	"trireme.dev/shared/sched/autoscale"
)

// world is a fleet whose NPUs all do the same, and a load. It tells what a scaler would measure, and does what it is told at once.
type world struct {
	view  autoscale.View
	rate  [autoscale.Stages]float64 // requests that an NPU encodes and prefills in a second of computing
	batch float64                   // sequences with which an NPU decodes in half of the target time, 50 ms
	load  float64                   // requests a second
	mix   [autoscale.Stages]float64 // pictures, prompts and answers of a request, in units of rate and 100 tokens
	noise *rand.Rand                // nil: arrivals are even
	names int
}

// newWorld has instances as "E P D*2" says: roles, and NPUs if there are more than one; "d" is a standby; spare NPUs besides.
func newWorld(instances string, spare int) *world {
	w := &world{rate: [autoscale.Stages]float64{1, 2, 0}, batch: 20, load: 1, mix: [autoscale.Stages]float64{1, 1, 1}}
	next := 0
	numbers := func(n int) []int {
		all := make([]int, n)
		for i := range all {
			all[i], next = next, next+1
		}
		return all
	}
	for _, text := range strings.Fields(instances) {
		roles, n := text, 1
		if at := strings.IndexByte(text, '*'); at > 0 {
			roles = text[:at]
			fmt.Sscan(text[at+1:], &n)
		}
		if strings.ToLower(roles) == roles {
			n = 0
		}
		w.start(strings.ToUpper(roles), numbers(n))
	}
	w.view.Spare = map[string][]int{"n": numbers(spare)}
	return w
}

func (w *world) start(roles string, npus []int) {
	w.view.Instances = append(w.view.Instances, autoscale.Instance{
		ID: fmt.Sprint("id", w.names), Name: fmt.Sprintf("%s-%02d", roles, w.names), Node: "n", Roles: roles, NPUs: npus, Ready: true, Replica: true,
	})
	w.names++
}

func (w *world) npus(role autoscale.Stage) int {
	n := 0
	for _, i := range w.view.Instances {
		if i.Has(role) {
			n += len(i.NPUs)
		}
	}
	return n
}

func (w *world) all() int {
	n := 0
	for _, i := range w.view.Instances {
		n += len(i.NPUs)
	}
	return n
}

// step is how long a decoding step takes.
func (w *world) step(batch float64) time.Duration {
	return time.Duration((0.025 + 0.025*batch/w.batch) * float64(time.Second))
}

// tick lets a second go by and returns what is known then.
func (w *world) tick() *autoscale.View {
	v := &w.view
	fresh := autoscale.Signal{Known: true}
	v.Now += time.Second
	n := w.load
	if w.noise != nil {
		n = poisson(w.noise, w.load)
	}
	d := &v.Demand
	d.Signal = fresh
	d.Requests += n
	d.Pictures += n * w.mix[0]
	d.Visual += 100 * n * w.mix[0]
	d.Prompt += 100 * n * w.mix[1]
	d.Output += 100 * n * w.mix[2]
	// As many sequences as Little's law says, at the rate of steps that they lead to.
	sequences := 0.0
	if decoders := float64(w.npus(autoscale.Decode)); decoders > 0 {
		for range 50 {
			sequences = min(300*decoders, w.load*w.mix[2]*100*w.step(sequences/decoders).Seconds())
		}
	}
	for s := range v.Queues {
		v.Queues[s] = autoscale.Queue{Signal: fresh}
	}
	v.Queues[autoscale.Decode].InWork = int(sequences)
	for k := range v.Instances {
		i := &v.Instances[k]
		i.Signal, i.Steps, i.Batch, i.KV, i.Busy = fresh, nil, 0, 0, 0
		i.Rate = [autoscale.Stages]float64{}
		if i.Standby() {
			continue
		}
		i.Busy = 0.5
		for s := range i.Rate {
			if i.Has(autoscale.Stage(s)) && w.load > 0 {
				i.Rate[s] = 100 * w.rate[s]
			}
		}
		if each := sequences / float64(max(1, w.npus(autoscale.Decode))); i.Has(autoscale.Decode) && each >= 1 {
			i.Batch = int(each) * len(i.NPUs)
			for _, b := range []int{max(1, int(each)/2), int(each)} {
				i.Steps = append(i.Steps, autoscale.Step{Batch: b, Took: w.step(float64(b))})
			}
		}
	}
	return v
}

// poisson draws how many arrive.
func poisson(r *rand.Rand, mean float64) float64 {
	n, t := 0.0, r.ExpFloat64()
	for t < mean {
		n, t = n+1, t+r.ExpFloat64()
	}
	return n
}

// do carries a change out, and fails the test if it cannot be.
func (w *world) do(t rapid.TB, c autoscale.Change) {
	t.Helper()
	find := func(name string) *autoscale.Instance {
		for k := range w.view.Instances {
			if w.view.Instances[k].Name == name {
				return &w.view.Instances[k]
			}
		}
		t.Fatalf("%+v: there is no %q", c, name)
		return nil
	}
	// take moves numbers from one list to another.
	take := func(from, to *[]int) {
		for _, n := range c.Numbers {
			at := slices.Index(*from, n)
			if at < 0 {
				t.Fatalf("%+v: NPU %d is not there to take", c, n)
			}
			*from = slices.Delete(*from, at, at+1)
			*to = append(*to, n)
		}
	}
	spare := w.view.Spare["n"]
	defer func() { w.view.Spare["n"] = spare }()
	check := func(name string, want int) {
		if got := len(find(name).NPUs); got != want {
			t.Fatalf("%+v: %s has %d NPUs then, not %d", c, name, got, want)
		}
	}
	switch c.Action {
	case autoscale.None, autoscale.Rebalance:
	case autoscale.Widen, autoscale.Promote:
		if c.Action == autoscale.Promote != find(c.Instance).Standby() {
			t.Fatalf("%+v", c)
		}
		take(&spare, &find(c.Instance).NPUs)
		check(c.Instance, c.NPUs)
	case autoscale.Narrow:
		take(&find(c.Instance).NPUs, &spare)
		check(c.Instance, c.NPUs)
	case autoscale.Move:
		to := c.Instance
		if to == "" {
			w.start(c.Roles, nil)
			to = w.view.Instances[len(w.view.Instances)-1].Name
		}
		take(&find(c.From).NPUs, &find(to).NPUs)
		check(to, c.NPUs)
		check(c.From, c.FromNPUs)
	case autoscale.Add:
		numbers := slices.Clone(c.Numbers)
		take(&spare, new([]int))
		for k := range c.Count {
			w.start(c.Roles, slices.Clone(numbers[k*c.NPUs:(k+1)*c.NPUs]))
		}
	case autoscale.Remove:
		c.Numbers = slices.Clone(find(c.Instance).NPUs)
		take(&find(c.Instance).NPUs, &spare)
		w.view.Instances = slices.DeleteFunc(w.view.Instances, func(i autoscale.Instance) bool { return i.Name == c.Instance })
	default:
		t.Fatalf("%+v: no such action", c)
	}
}

// run lets seconds go by and returns the changes that were made.
func (w *world) run(t rapid.TB, s *autoscale.State, seconds int, each func(autoscale.Decision)) []autoscale.Change {
	t.Helper()
	var made []autoscale.Change
	for range seconds {
		d := s.Decide(w.tick())
		w.do(t, d.Change)
		if d.Change.Action != autoscale.None {
			made = append(made, d.Change)
		}
		if each != nil {
			each(d)
		}
	}
	return made
}
