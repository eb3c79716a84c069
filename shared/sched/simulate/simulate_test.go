package simulate

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/autoscale"
)

// plain costs: a picture's tokens are milliseconds, a step has a fixed part.
type plain struct {
	token, step, prompt, sequence, context, copy time.Duration
}

func (p plain) Encode(tokens int) time.Duration { return time.Duration(tokens) * p.token }
func (p plain) Step(w Work) time.Duration {
	return p.step + time.Duration(w.Prompt)*p.prompt + time.Duration(w.Decoding)*p.sequence + time.Duration(w.Context)*p.context
}
func (p plain) Copy(tokens int) time.Duration { return time.Duration(tokens) * p.copy }

var a100 = plain{
	token: 7 * time.Millisecond, step: 20 * time.Millisecond, prompt: 100 * time.Microsecond, sequence: 40 * time.Microsecond, context: 600 * time.Nanosecond,
}

// fleetOf has instances as "E P D*2 EPD": roles, and NPUs if there are more than one, 0 for a standby.
func fleetOf(cfg Config, instances ...string) Config {
	for k, text := range instances {
		i := Instance{Name: fmt.Sprint("i", k), Node: "n", NPUs: 1, Replica: true}
		if n, _ := fmt.Sscanf(text, "%3s", &i.Roles); n == 1 {
			for at, c := range text {
				if c == '*' {
					i.Roles = text[:at]
					fmt.Sscan(text[at+1:], &i.NPUs)
				}
			}
		}
		cfg.Instances = append(cfg.Instances, i)
	}
	return cfg
}

func run(t rapid.TB, cfg Config, load []Request, length time.Duration) *Result {
	t.Helper()
	f, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r, err := f.Run(load, length)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// A request that is alone takes what its parts take, to the nanosecond.
func TestAlone(t *testing.T) {
	c := plain{
		token: 7 * time.Millisecond, step: 20 * time.Millisecond, prompt: 100 * time.Microsecond, sequence: 30 * time.Microsecond,
		context: time.Microsecond, copy: 10 * time.Microsecond,
	}
	r := run(t, fleetOf(Config{Costs: c, Front: 5 * time.Millisecond, Hop: time.Millisecond}, "E", "P", "D"),
		[]Request{{Pictures: 2, Visual: 70, Prompt: 640, Output: 4}}, 0)
	o := r.Outcomes[0]
	encode := 2 * 70 * 7 * time.Millisecond // one NPU, one after the other
	prefill := 2*20*time.Millisecond + 640*100*time.Microsecond
	if want := 5*time.Millisecond + 2*time.Millisecond + encode + prefill; o.TTFT != want {
		t.Errorf("TTFT %v, want %v", o.TTFT, want)
	}
	// Three steps, with 641, 642 and 643 tokens of context; before them a hop and the copy of 641 tokens.
	decode := time.Millisecond + 641*10*time.Microsecond + 3*(20*time.Millisecond+30*time.Microsecond) + (641+642+643)*time.Microsecond
	if want := o.TTFT + decode; o.E2E != want || o.TPOT != decode/3 {
		t.Errorf("E2E %v, TPOT %v, want %v and %v", o.E2E, o.TPOT, want, decode/3)
	}
	if r.Steps != 2+3 {
		t.Errorf("%d steps", r.Steps)
	}
}

// With several encoders the pictures of a request are encoded at once (intra-request parallelism), on NPUs of one instance or several.
// Those of one instance compute their pieces together: the first picture comes a moment before the others, which join it after a piece.
func TestPicturesInParallel(t *testing.T) {
	for _, fleet := range [][]string{{"E*4", "P", "D"}, {"E", "E", "E", "E", "P", "D"}} {
		r := run(t, fleetOf(Config{Costs: a100}, fleet...), []Request{{Pictures: 8, Visual: 70, Prompt: 600, Output: 1}}, 0)
		want := 2*490*time.Millisecond + 2*20*time.Millisecond + 60*time.Millisecond
		if len(fleet) < 6 {
			want += 490 * time.Millisecond / 7
		}
		if r.Outcomes[0].TTFT != want {
			t.Errorf("%v: TTFT %v, want %v", fleet, r.Outcomes[0].TTFT, want)
		}
	}
}

// The wait for one encoder is that of M/D/1 (Pollaczek and Khinchine): rho / (2 (1 - rho)) service times on average.
func TestWaitOfOneEncoder(t *testing.T) {
	const service = 0.49
	for _, rho := range []float64{0.3, 0.6, 0.8} {
		rate, peak := Steady(rho / service)
		load, length := Draw(3, []Phase{{Length: 60 * time.Hour, Rate: rate, Peak: peak, Kind: Kind{
			Pictures: [2]int{1, 1}, Visual: 70, Words: [2]int{30, 30}, Output: [2]int{1, 1},
		}}})
		// Prefill is free, so that nothing waits there; the line lets all in.
		r := run(t, fleetOf(Config{Costs: plain{token: 7 * time.Millisecond}, Ahead: 1 << 30}, "E", "P", "D"), load, length)
		sum := 0.0
		for _, o := range r.Outcomes {
			sum += o.TTFT.Seconds() - service
		}
		got, want := sum/float64(len(load)), rho/(2*(1-rho))*service
		t.Logf("rho %.1f: %d requests wait %.3f s on average, M/D/1 says %.3f s", rho, len(load), got, want)
		if math.Abs(got-want) > 0.03*want { // a standard error or two of so many
			t.Errorf("rho %.1f: mean wait %.4f s, want %.4f s", rho, got, want)
		}
	}
}

// The number of sequences that decode is what Little's law says of the rate and the time that each stays, and steps are as long as that
// batch asks for: the fixed point in closed form.
func TestDecodeBatch(t *testing.T) {
	c := plain{step: 20 * time.Millisecond, sequence: 500 * time.Microsecond}
	const rate, output = 5.0, 200
	of, peak := Steady(rate)
	load, length := Draw(9, []Phase{{Length: 4 * time.Hour, Rate: of, Peak: peak, Kind: Kind{Words: [2]int{1, 1}, Output: [2]int{output, output}}}})
	r := run(t, fleetOf(Config{Costs: c}, "E", "P", "D"), load, length)
	sum, tokens := 0.0, 0.0
	for _, o := range r.Outcomes {
		sum += (o.E2E - o.TTFT).Seconds()
		tokens += output - 1
	}
	// n = rate (output-1) step(n), step(n) = a + b n  =>  step = a / (1 - b rate (output-1)). A token is seen by the mean batch of its step,
	// which is larger than the mean over time as batches vary by chance (about n, Poisson's): by one.
	step := 0.020 / (1 - 0.0005*rate*(output-1))
	got := sum / tokens
	t.Logf("a token takes %.2f ms, the fixed point is %.2f ms", 1e3*got, 1e3*step)
	if math.Abs(got-step) > 0.03*step {
		t.Errorf("a token takes %.3f ms, want %.3f ms", 1e3*got, 1e3*step)
	}
}

// With next to no load every request takes as long as if it were alone.
func TestLightLoad(t *testing.T) {
	of, peak := Steady(0.002)
	kind := Kind{Pictures: [2]int{1, 3}, Visual: 64, Words: [2]int{20, 200}, Output: [2]int{2, 50}}
	load, length := Draw(5, []Phase{{Length: 100 * time.Hour, Rate: of, Peak: peak, Kind: kind}})
	off := 0
	for _, o := range run(t, fleetOf(Config{Costs: a100}, "EPD", "E*2"), load, length).Outcomes {
		own := o.Request
		own.Arrive = 0
		alone := run(t, fleetOf(Config{Costs: a100}, "EPD", "E*2"), []Request{own}, 0).Outcomes[0]
		if o.E2E != alone.E2E {
			off++
		}
	}
	if off > len(load)/50 { // those that met another one by chance
		t.Errorf("%d of %d requests took longer than alone", off, len(load))
	}
}

// chance is a Controller that changes whatever can be changed.
type chance struct {
	r    *rand.Rand
	many int
}

func (c *chance) Name() string         { return "chance" }
func (c *chance) Every() time.Duration { return 2 * time.Second }
func (c *chance) Decide(v *autoscale.View) (all []Order) {
	for range c.many {
		i := &v.Instances[c.r.IntN(len(v.Instances))]
		j := &v.Instances[c.r.IntN(len(v.Instances))]
		spare := v.Spare[i.Node]
		some := func(n []int) []int {
			if len(n) == 0 {
				return nil
			}
			return slices.Clone(n[:1+c.r.IntN(len(n))])
		}
		o := autoscale.Change{Node: i.Node, Instance: i.Name, Roles: i.Roles}
		switch c.r.IntN(7) {
		case 0:
			o.Action, o.Numbers = autoscale.Widen, some(spare)
			if i.Standby() {
				o.Action = autoscale.Promote
			}
		case 1:
			o.Action, o.Numbers = autoscale.Narrow, some(i.NPUs)
		case 2, 3:
			o.Action, o.From, o.Numbers = autoscale.Move, j.Name, some(j.NPUs)
			if c.r.IntN(4) == 0 {
				o.Instance = ""
			}
		case 4:
			o.Action, o.Numbers, o.Count, o.NPUs = autoscale.Add, some(spare), 1, 0
			o.NPUs = len(o.Numbers)
		case 5:
			o.Action = autoscale.Remove
		case 6:
			o.Action = autoscale.Rebalance
		}
		all = append(all, Order{Change: o})
	}
	return all
}

// Whatever is changed and whatever arrives: every request ends, with all its tokens; every piece of work is done once; NPUs neither get
// lost nor double; and no stage is ever without one.
func TestNothingIsLost(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		kinds := []string{"E", "P", "D", "EP", "PD", "EPD", "ED"}
		fleet := []string{"EPD"}
		if rapid.Bool().Draw(rt, "apart") {
			fleet = []string{"E*3", "P*2", "D*2"}
		}
		for range rapid.IntRange(0, 5).Draw(rt, "more") {
			fleet = append(fleet, fmt.Sprintf("%s*%d", rapid.SampledFrom(kinds).Draw(rt, "roles"), rapid.IntRange(0, 3).Draw(rt, "npus")))
		}
		c := a100
		c.copy = time.Duration(rapid.SampledFrom([]int{0, 0, 20}).Draw(rt, "copy")) * time.Microsecond
		counted := &counting{plain: c}
		cfg := fleetOf(Config{
			Seed: rapid.Uint64().Draw(rt, "seed"), Costs: counted, Hop: time.Millisecond, Jitter: 0.3, Drag: 1.1, Lost: 0.1,
			Lag: [2]time.Duration{50 * time.Millisecond, 900 * time.Millisecond}, KV: rapid.SampledFrom([]int{0, 2000}).Draw(rt, "kv"),
			Spare: map[string]int{"n": rapid.IntRange(0, 4).Draw(rt, "spare")}, Order: rapid.SampledFrom([]sched.Policy{sched.FCFS, sched.SLO, sched.SJF}).Draw(rt, "order"),
			Ahead: rapid.SampledFrom([]int{2, 32}).Draw(rt, "ahead"), Targets: sched.Targets{TTFT: 2 * time.Second, TPOT: 60 * time.Millisecond},
			Control: &chance{rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "changes"), 0)), rapid.IntRange(0, 3).Draw(rt, "many")},
		}, fleet...)
		if rapid.Bool().Draw(rt, "aims") {
			cfg.Aims = cfg.Targets
		}
		of, peak := Steady(rapid.Float64Range(0.2, 6).Draw(rt, "rate"))
		load, length := Draw(rapid.Uint64().Draw(rt, "load"), []Phase{{Length: 40 * time.Second, Rate: of, Peak: peak, Kind: Kind{
			Pictures: [2]int{0, 4}, Visual: 64, Words: [2]int{1, 800}, Output: [2]int{1, 300},
		}}})
		f, err := New(cfg)
		if err != nil {
			rt.Fatal(err)
		}
		all := f.held() + len(f.spare["n"])
		var check func()
		check = func() {
			seen := map[int]bool{}
			once := func(n int) {
				if seen[n] {
					rt.Fatalf("%v: NPU %d is there twice", f.now, n)
				}
				seen[n] = true
			}
			var served stages
			for _, i := range f.instances {
				for _, n := range i.numbers() {
					once(n)
				}
				if i.open != 0 && !i.closing {
					served |= i.set
				}
				for _, n := range i.npus {
					if n != nil && (n.seqs < 0 || n.kv < 0) {
						rt.Fatalf("%v: %+v", f.now, *n)
					}
				}
			}
			for _, o := range f.ops {
				for _, n := range o.reserved {
					once(n)
				}
			}
			for _, n := range f.spare["n"] {
				once(n)
			}
			if len(seen) != all || f.held()+len(f.spare["n"]) != all || served != 1<<autoscale.Stages-1 {
				rt.Fatalf("%v: %d NPUs, %d held and %v spare, of %d; stages %b are served", f.now, len(seen), f.held(), f.spare["n"], all, served)
			}
			if f.open > 0 {
				f.after(500*time.Millisecond, check)
			}
		}
		f.at(0, check)
		r, err := f.Run(load, length)
		if err != nil {
			rt.Fatal(err)
		}
		var prompt, decode, visual int
		for i, o := range r.Outcomes {
			if o.E2E < o.TTFT || o.TTFT <= 0 || o.Output > 1 && o.TPOT <= 0 {
				rt.Fatalf("request %d: %+v", i, o)
			}
			prompt += o.Prompt
			decode += o.Output - 1
			visual += o.Pictures * o.Visual
		}
		if counted.prompt != prompt || counted.decoding != decode || counted.pictures != visual*f.cfg.Pieces {
			rt.Fatalf("computed %d prompt tokens, %d tokens, %d of pictures; asked for were %d, %d, %d", counted.prompt, counted.decoding,
				counted.pictures, prompt, decode, visual*f.cfg.Pieces)
		}
		if f.open != 0 || f.line.open != 0 || f.line.kv != 0 || f.line.ahead != 0 {
			rt.Fatalf("%d requests open, line %+v", f.open, f.line)
		}
		if most := time.Duration(all) * f.end; r.NPUTime < 0 || r.NPUTime > most {
			rt.Fatalf("%v of NPUs, of %v", r.NPUTime, most)
		}
		rt.Logf("%d changes, %d refused", len(r.Made), len(r.Refused))
	})
}

// counting counts what is computed. Pictures are asked for piece by piece.
type counting struct {
	plain
	prompt, decoding, pictures int
}

func (c *counting) Encode(tokens int) time.Duration {
	c.pictures += tokens
	return c.plain.Encode(tokens)
}

func (c *counting) Step(w Work) time.Duration {
	if w.Decoding+w.Context+w.Pairs > 0 { // else it is an estimate
		c.prompt += w.Prompt
		c.decoding += w.Decoding
	}
	return c.plain.Step(w)
}

// The same seeds give the same result, to the bit; other seeds another one.
func TestDeterminism(t *testing.T) {
	once := func(seed uint64) *Result {
		of, peak := Steady(3)
		load, length := Draw(seed, []Phase{{Length: 2 * time.Minute, Rate: of, Peak: peak, Kind: Kind{
			Pictures: [2]int{0, 2}, Visual: 64, Words: [2]int{1, 200}, Output: [2]int{1, 200},
		}}})
		return run(t, fleetOf(Config{
			Seed: seed, Costs: a100, Jitter: 0.2, Lag: [2]time.Duration{0, time.Second}, Spare: map[string]int{"n": 3},
			Control: &chance{rand.New(rand.NewPCG(seed, 0)), 2},
		}, "E*2", "P", "D*2"), load, length)
	}
	if a, b := once(1), once(1); !reflect.DeepEqual(a, b) {
		t.Error("the same seed gives two results")
	}
	if a, b := once(1), once(2); reflect.DeepEqual(a.Outcomes, b.Outcomes) {
		t.Error("another seed gives the same result")
	}
}

// More NPUs never make the mean time to the first token much worse, and a fleet that is overloaded gets further behind for ever.
func TestMoreNPUsHelp(t *testing.T) {
	of, peak := Steady(3)
	load, length := Draw(4, []Phase{{Length: 5 * time.Minute, Rate: of, Peak: peak, Kind: Kind{
		Pictures: [2]int{1, 1}, Visual: 64, Words: [2]int{20, 20}, Output: [2]int{20, 20},
	}}})
	var means []time.Duration
	for n := range 4 {
		var sum time.Duration
		for _, o := range run(t, fleetOf(Config{Costs: a100}, fmt.Sprintf("E*%d", n+1), "P", "D"), load, length).Outcomes {
			sum += o.TTFT
		}
		means = append(means, sum/time.Duration(len(load)))
	}
	t.Log(means)
	if !slices.IsSortedFunc(means, func(a, b time.Duration) int { return cmp.Compare(b, a) }) {
		t.Errorf("with more encoders: %v", means)
	}
	// A picture takes 0.448 s: 0.34 s of work a second are left over, 100 s after 5 minutes, of which half is waited for on average.
	if means[0] < 30*time.Second || means[0] > 60*time.Second || means[2] > time.Second {
		t.Errorf("%v", means)
	}
}

func TestConfigErrors(t *testing.T) {
	for name, cfg := range map[string]Config{
		"no costs":       fleetOf(Config{}, "EPD"),
		"no decoder":     fleetOf(Config{Costs: a100}, "E", "P"),
		"only a standby": fleetOf(Config{Costs: a100}, "E", "P", "D*0"),
		"jitter":         fleetOf(Config{Costs: a100, Jitter: 1}, "EPD"),
		"lag":            fleetOf(Config{Costs: a100, Lag: [2]time.Duration{2, 1}}, "EPD"),
		"twice":          {Costs: a100, Instances: []Instance{{Name: "a", Roles: "EPD", NPUs: 1}, {Name: "a", Roles: "EPD", NPUs: 1}}},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	f, err := New(fleetOf(Config{Costs: a100, KV: 100}, "EPD"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Run([]Request{{Prompt: 90, Output: 20}}, 0); err == nil {
		t.Error("a request for which there is no memory is taken")
	}
	cfg := fleetOf(Config{Costs: a100}, "P", "D")
	cfg.Instances[1].KV = 100
	if f, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Run([]Request{{Prompt: 90, Output: 20}}, 0); err == nil {
		t.Error("a request for which its decoder has no memory is taken")
	}
	if f, err = New(fleetOf(Config{Costs: a100}, "P", "D")); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Run([]Request{{Pictures: 1, Visual: 64, Prompt: 90, Output: 20}}, 0); err == nil {
		t.Error("a picture that nobody can encode is taken")
	}
}

// Text needs no encoder. A run that is to end when too many have missed their targets ends there, and knows which had until then; one that may
// go on knows all.
func TestMisses(t *testing.T) {
	var load []Request
	for i := range 100 {
		load = append(load, Request{Arrive: time.Duration(i) * 10 * time.Millisecond, Prompt: 512, Output: 5})
	}
	targets := sched.Targets{TTFT: 200 * time.Millisecond, TPOT: time.Second}
	all := run(t, fleetOf(Config{Costs: a100, Targets: targets}, "P", "D"), load, 0)
	late := 0
	for i := range all.Outcomes {
		if !all.Outcomes[i].Good(targets) {
			late++
		}
	}
	if all.Missed != late || late < 50 {
		t.Errorf("%d missed, %d were late", all.Missed, late)
	}
	some := run(t, fleetOf(Config{Costs: a100, Targets: targets, Misses: 11}, "P", "D"), load, 0)
	if some.Missed != 11 || some.Steps >= all.Steps || some.Length >= all.Length {
		t.Errorf("%d missed after %d of %d steps", some.Missed, some.Steps, all.Steps)
	}
	u := all.Used[0]
	if want := 100 * (20*time.Millisecond + 512*100*time.Microsecond); u.Roles != "P" || u.NPUs != 1 || u.Busy != want {
		t.Errorf("prefill computed for %v, want %v: %+v", u.Busy, want, u)
	}
}

// Larger steps take more of a prompt at once, and of two decoders the one with room gets what the other has no memory for.
func TestRowsAndRoom(t *testing.T) {
	load := []Request{{Prompt: 1024, Output: 2}}
	for rows, steps := range map[int]int{0: 2, 512: 2, 1024: 1, 100: 11} {
		if r := run(t, fleetOf(Config{Costs: a100, Rows: rows}, "P", "D"), load, 0); r.Steps != steps+1 {
			t.Errorf("%d rows: %d steps, want %d and one that decodes", rows, r.Steps, steps)
		}
	}
	cfg := fleetOf(Config{Costs: a100}, "P", "D", "D")
	cfg.Instances[1].KV, cfg.Instances[2].KV = 600, 3000
	load = nil
	for range 5 {
		load = append(load, Request{Prompt: 500, Output: 100})
	}
	r := run(t, cfg, load, 0)
	if a, b := r.Used[1].Busy, r.Used[2].Busy; a == 0 || b == 0 || b < a {
		t.Errorf("busy for %v and %v, %d steps", a, b, r.Steps)
	}
}

// As at the gateway, so many requests are under way to their first token for each NPU that encodes or computes prompts; one of an instance that
// does both counts once, a standby has none.
func TestAheadCountsNPUs(t *testing.T) {
	for _, c := range []struct {
		fleet []string
		npus  int
	}{
		{[]string{"E", "P", "D*3"}, 2},
		{[]string{"E*3", "P*2", "D"}, 5},
		{[]string{"EP*4", "P", "D"}, 5},
		{[]string{"EP*0", "EPD*2", "D"}, 2},
	} {
		f, err := New(fleetOf(Config{Costs: a100, Ahead: 3}, c.fleet...))
		if err != nil {
			t.Fatal(err)
		}
		load := make([]Request, 40)
		for i := range load {
			load[i] = Request{Prompt: 100, Output: 2}
		}
		most := 0
		var look func()
		look = func() {
			if most = max(most, f.line.ahead); f.open > 0 {
				f.after(time.Millisecond, look)
			}
		}
		f.at(time.Millisecond, look)
		if _, err := f.Run(load, 0); err != nil {
			t.Fatal(err)
		}
		if most != 3*c.npus {
			t.Errorf("%v: %d requests were under way at once, want 3 for each of %d NPUs", c.fleet, most, c.npus)
		}
	}
}
