package pace

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kernel/ref"
)

// clock is a fake clock whose sleeps last too long by what oversleep says.
type clock struct {
	now       time.Time
	oversleep func() time.Duration
	slept     time.Duration
}

func (c *clock) sleep(d time.Duration) {
	c.slept += d
	c.now = c.now.Add(d + c.oversleep())
}

func paced(t *testing.T, p *Profile, c *clock) *Compute {
	t.Helper()
	n := New(ref.New(), p)
	n.now, n.sleep = func() time.Time { return c.now }, c.sleep
	return n
}

func ms(n float64) time.Duration { return time.Duration(n * float64(time.Millisecond)) }

// Every built-in profile can be used, and a step costs what its comments say.
func TestBuiltIn(t *testing.T) {
	want := map[string]map[kernel.Work]float64{ // ms
		"epd-minicpm-a100": {
			{Tokens: 64, Parts: 1}:             440,
			{Tokens: 64, Parts: 5}:             88,
			{Prompt: 74, Visual: 64}:           45.5,
			{Decoding: 1, Context: 100}:        25,
			{Decoding: 64, Context: 6400}:      25,
			{Prompt: 100, Decoding: 8}:         32,
			{Prompt: 64, Visual: 64, Pairs: 9}: 44.8,
		},
		"distserve-opt-13b-a100": {
			{Prompt: 1000, Pairs: 500_000}:   18.10 + 101.91 + 7.12, // 7.12e-6 * 1000^2
			{Decoding: 1, Context: 1000}:     19.93 + 0.627 + 0.0385,
			{Decoding: 94, Context: 0}:       19.93 + 94*0.0385,
			{Decoding: 95, Context: 100_000}: 7.17 + 58.0 + 95*0.158,
			{Prompt: 10, Decoding: 2}:        19.93 + 1.0191 + 0.077, // the fixed time counts once
		},
	}
	for _, name := range Names() {
		p, err := Load(name)
		if err != nil {
			t.Fatal(err)
		}
		if p.Name != name || len(want[name]) == 0 {
			t.Errorf("profile %s calls itself %s; its costs have to be in this test", name, p.Name)
		}
		for w, cost := range want[name] {
			if d := p.Cost(w) - ms(cost); d < -time.Microsecond || d > time.Microsecond {
				t.Errorf("%s: %+v costs %v, want %g ms", name, w, p.Cost(w), cost)
			}
		}
	}
	if len(want) != len(Names()) {
		t.Errorf("built in are %v", Names())
	}
}

// The rate is the profile's whatever sleeping costs, and host time between steps delays what follows by just that.
func TestRate(t *testing.T) {
	p, err := Load("distserve-opt-13b-a100")
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	c := &clock{now: time.Unix(1000, 0), oversleep: func() time.Duration { return time.Duration(rng.Int64N(int64(3 * time.Millisecond))) }}
	n := paced(t, p, c)
	begin := c.now
	var want time.Duration
	for i := range 10_000 {
		w := kernel.Work{Decoding: 1 + i%128, Context: 100 * i % 128}
		want += p.Cost(w)
		n.Begin(w)
		c.now = c.now.Add(ms(2 * rng.Float64())) // what the host computes is part of the step
		n.End()
		if between := time.Duration(0); i%3 == 0 {
			between = ms(rng.Float64())
			c.now = c.now.Add(between)
			want += between
		}
	}
	if late := c.now.Sub(begin) - want; late < 0 || late > 3*time.Millisecond {
		t.Errorf("10000 steps of %v took %v too long: more than one sleep's error", want, late)
	}
	if n.Behind() != 0 {
		t.Errorf("behind by %v, with a host that is fast enough", n.Behind())
	}
	if busy := want - n.Busy(); busy < 0 || busy > time.Duration(10_000)*time.Millisecond {
		t.Errorf("busy %v of %v", n.Busy(), want)
	}
}

// After a pause an NPU is not faster for it.
func TestIdle(t *testing.T) {
	p := &Profile{Decode: Decode{Step: 10}}
	c := &clock{now: time.Unix(1000, 0), oversleep: func() time.Duration { return ms(2) }}
	n := paced(t, p, c)
	for range 5 {
		begin := c.now
		n.Begin(kernel.Work{Decoding: 1})
		n.End()
		if took := c.now.Sub(begin); took != ms(12) {
			t.Errorf("a step of 10 ms and 2 ms of sleeping too long took %v", took)
		}
		c.now = c.now.Add(time.Second)
	}
}

// A host that is too slow for the profile is told, sets the rate, and nothing is made up for later.
func TestBehind(t *testing.T) {
	p := &Profile{Decode: Decode{Step: 10}}
	c := &clock{now: time.Unix(1000, 0), oversleep: func() time.Duration { return 0 }}
	n := paced(t, p, c)
	begin := c.now
	for range 10 {
		n.Begin(kernel.Work{Decoding: 1})
		c.now = c.now.Add(ms(15))
		n.End()
	}
	if took := c.now.Sub(begin); took != ms(150) || c.slept != 0 || n.Behind() != ms(50) {
		t.Errorf("10 steps took %v, %v of it asleep, behind by %v", took, c.slept, n.Behind())
	}
	begin = c.now
	n.Begin(kernel.Work{Decoding: 1})
	n.End()
	if took := c.now.Sub(begin); took != ms(10) {
		t.Errorf("the next step took %v", took)
	}
}

// Weights take their room from KV: those of an instance's roles, and of experts an NPU's share.
func TestRoom(t *testing.T) {
	m := Memory{NPU: 60, Vision: 1, Text: 4, Experts: 56, KVToken: 0.1}
	for _, x := range []struct {
		roles  string
		npus   int
		tokens int
		fits   bool
	}{{"E", 1, 0, true}, {"D", 1, 0, false}, {"D", 2, 280_000, true}, {"EPD", 2, 270_000, true}, {"PD", 8, 490_000, true}} {
		if tokens, fits := m.Room(x.roles, x.npus); fits != x.fits || fits && tokens != x.tokens {
			t.Errorf("%s on %d NPUs: %d tokens, %v", x.roles, x.npus, tokens, fits)
		}
	}
	if tokens, fits := (&Memory{}).Room("EPD", 1); tokens != 0 || !fits {
		t.Errorf("with unknown memory: %d tokens, %v", tokens, fits)
	}
	opt, err := Load("distserve-opt-13b-a100")
	if err != nil {
		t.Fatal(err)
	}
	if tokens, fits := opt.Memory.Room("D", 1); tokens != 56_152 || !fits {
		t.Errorf("OPT-13B: %d tokens, %v", tokens, fits)
	}
}

func TestBadProfiles(t *testing.T) {
	const good = "name: mine\nsource: measured\nencode: {picture_ms: 1}\nprefill: {token_ms: 1}\ndecode: {step_ms: 1}\n"
	dir := t.TempDir()
	load := func(text string) error {
		file := filepath.Join(dir, "p.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Load(file)
		return err
	}
	if err := load(good); err != nil {
		t.Error(err)
	}
	if err := load(good + "copy: {kv_token_ms: 0.5, picture_token_ms: 2}\n"); err != nil {
		t.Error(err)
	}
	if got := (&Profile{Copy: Copy{KV: 0.5, Picture: 2}}).CopyCost(100, 10); got != ms(70) {
		t.Errorf("a copy of 100 tokens and 10 of pictures takes %v", got)
	}
	if err := load(good + "memory: {npu_gb: 60, vision_gb: 1, text_gb: 4, experts_gb: 56, kv_token_mb: 0.1}\n"); err != nil {
		t.Error(err)
	}
	for text, say := range map[string]string{
		"":                                       "EOF",
		strings.Replace(good, "mine", "", 1):     "needs a name",
		strings.Replace(good, "measured", "", 1): "source",
		good + "speed: 3\n":                      "speed",
		strings.Replace(good, "picture_ms: 1", "picture_ms: -1", 1): "-1 ms",
		strings.Replace(good, "token_ms: 1", "token_ms: .nan", 1):   "NaN",
		good + "copy: {kv_token_ms: -2}\n":                          "-2 ms",
		good + "memory: {npu_gb: -80}\n":                            "-80 GB",
		strings.Replace(good, "picture_ms: 1", "picture_ms: 0", 1):  "a picture takes no time",
		strings.Replace(good, "token_ms: 1", "token_ms: 0", 1):      "a prompt takes no time",
		strings.Replace(good, "{step_ms: 1}", "{}", 1):              "a token takes no time",
	} {
		if err := load(text); !errors.Is(err, ErrProfile) || !strings.Contains(err.Error(), say) {
			t.Errorf("%q: %v, want something about %q", text, err, say)
		}
	}
	if _, err := Load("nosuch"); !errors.Is(err, ErrProfile) || !strings.Contains(err.Error(), "epd-minicpm-a100") {
		t.Errorf("a name that is not built in: %v", err)
	}
	if _, err := Load("./nosuch.yaml"); !errors.Is(err, ErrProfile) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}
