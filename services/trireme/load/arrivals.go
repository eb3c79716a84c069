package load

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"gonum.org/v1/gonum/stat/distuv"
)

// Arrivals say when requests arrive.
type Arrivals interface {
	// offsets are the times of n requests from the start of the run, rising; the first is 0.
	offsets(seed uint64, n int) ([]time.Duration, error)
	// Rate is the mean number of requests a second; 0 when it is not known.
	Rate() float64
	// String is the form that ParseArrivals reads.
	String() string
}

// ErrArrivals is returned by ParseArrivals for text that names no arrivals.
var ErrArrivals = errors.New("no such arrivals")

// ParseArrivals reads how requests arrive, at a mean rate of so many a second:
//
//	poisson     independent of one another: exponential gaps
//	gamma:B     gaps with a gamma distribution of shape B: below 1 burstier than poisson, above 1 steadier
//	bursts:N    N at a time, the bursts at even gaps
//	constant    at even gaps
//	file:PATH   a time in seconds on each line of the file (rate is not used); later columns and # lines are ignored
func ParseArrivals(text string, rate float64) (Arrivals, error) {
	kind, arg, has := strings.Cut(text, ":")
	bad := func(want string) error { return fmt.Errorf("arrivals %q: %s: %w", text, want, ErrArrivals) }
	if kind == "file" {
		if arg == "" {
			return nil, bad("which file? write file:PATH")
		}
		return readSchedule(arg)
	}
	if !(rate > 0) || rate > 1e6 {
		return nil, fmt.Errorf("%g requests a second: it must be above 0 and at most a million: %w", rate, ErrArrivals)
	}
	switch {
	case kind == "poisson" && !has:
		return gammaArrivals{rate: rate, shape: 1}, nil
	case kind == "constant" && !has:
		return bursts{rate, 1}, nil
	case kind == "gamma":
		shape, err := strconv.ParseFloat(arg, 64)
		if err != nil || !(shape > 0) || shape > 1e6 {
			return nil, bad("the shape must be a number above 0, as in gamma:0.5")
		}
		return gammaArrivals{rate: rate, shape: shape}, nil
	case kind == "bursts":
		n, err := strconv.Atoi(arg)
		if err != nil || n < 1 {
			return nil, bad("the size must be a number above 0, as in bursts:8")
		}
		return bursts{rate, n}, nil
	}
	return nil, bad("there are poisson, gamma:B, bursts:N, constant and file:PATH")
}

// gammaArrivals have gaps with a gamma distribution of mean 1/rate; shape 1 is a Poisson process. vllm bench serve
// calls the shape burstiness.
type gammaArrivals struct{ rate, shape float64 }

func (g gammaArrivals) Rate() float64 { return g.rate }

func (g gammaArrivals) String() string {
	if g.shape == 1 {
		return "poisson"
	}
	return "gamma:" + strconv.FormatFloat(g.shape, 'g', -1, 64)
}

func (g gammaArrivals) offsets(seed uint64, n int) ([]time.Duration, error) {
	gap := distuv.Gamma{Alpha: g.shape, Beta: g.shape * g.rate, Src: rand.NewPCG(seed, arrivalStream)}
	out := make([]time.Duration, n)
	at := 0.0
	for i := 1; i < n; i++ {
		at += gap.Rand()
		out[i] = time.Duration(at * float64(time.Second))
	}
	return out, nil
}

// arrivalStream tells the draws of arrivals from those of requests, which have the same seed.
const arrivalStream = 1

// bursts are size requests at once, at even gaps.
type bursts struct {
	rate float64
	size int
}

func (b bursts) Rate() float64 { return b.rate }

func (b bursts) String() string {
	if b.size == 1 {
		return "constant"
	}
	return "bursts:" + strconv.Itoa(b.size)
}

func (b bursts) offsets(_ uint64, n int) ([]time.Duration, error) {
	out := make([]time.Duration, n)
	for i := range out {
		out[i] = time.Duration(float64(i/b.size*b.size) / b.rate * float64(time.Second))
	}
	return out, nil
}

// schedule is a list of times.
type schedule struct {
	path  string
	times []time.Duration
}

func readSchedule(path string) (Arrivals, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading arrivals: %w", err)
	}
	defer f.Close()
	times, err := parseSchedule(f)
	if err != nil {
		return nil, fmt.Errorf("reading arrivals from %s: %w", path, err)
	}
	return schedule{path, times}, nil
}

func parseSchedule(r io.Reader) ([]time.Duration, error) {
	var times []time.Duration
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		first, _, _ := strings.Cut(line, ",")
		s, err := strconv.ParseFloat(strings.Fields(first + " .")[0], 64)
		if err != nil || !(s >= 0) || s > 1e6 {
			return nil, fmt.Errorf("line %d, %.40q: the first column must be a time in seconds: %w", n, line, ErrArrivals)
		}
		times = append(times, time.Duration(s*float64(time.Second)))
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if len(times) == 0 {
		return nil, fmt.Errorf("there are no times in it: %w", ErrArrivals)
	}
	slices.Sort(times)
	first := times[0]
	for i := range times {
		times[i] -= first
	}
	return times, nil
}

func (s schedule) Rate() float64 {
	if last := s.times[len(s.times)-1]; last > 0 {
		return float64(len(s.times)-1) / last.Seconds()
	}
	return 0
}

func (s schedule) String() string { return "file:" + s.path }

// Len is the number of requests of a schedule that is read from a file; 0 for others, which have no end.
func Len(a Arrivals) int {
	if s, ok := a.(schedule); ok {
		return len(s.times)
	}
	return 0
}

func (s schedule) offsets(_ uint64, n int) ([]time.Duration, error) {
	if n > len(s.times) {
		return nil, fmt.Errorf("%d requests are wanted, %s has %d times: %w", n, s.path, len(s.times), ErrArrivals)
	}
	return s.times[:n], nil
}
