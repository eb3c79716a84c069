// Package hbmbench is the measurements of device memory on the host that `trireme bench memory` prints and the benchmarks
// of mem/host and services/hmm run: one code for both, so that the two speak of the same things. It serves nobody.
package hbmbench

import (
	"context"
	"errors"
	"slices"
	"time"
)

// Case is one measurement. It is made by the functions of this package, done many times, and closed.
type Case struct {
	Extents int   // mapped, attached or claimed for at a time; 0: it is not about extents
	Calls   int   // of the HMM at a time; 0: it is not about calls
	Bytes   int64 // handed over, copied or checked at a time; 0: it is not about bytes

	// Do does it once and returns the time of what is measured, without that of undoing it.
	Do func() (time.Duration, error)
	// Close gives back what the case holds.
	Close func() error
}

func nothing() error { return nil }

// timed is the time that f takes.
func timed(f func() error) (time.Duration, error) {
	start := time.Now()
	err := f()
	return time.Since(start), err
}

// Samples are the times of a case, shortest first.
type Samples []time.Duration

// Quantile is the q-th quantile, 0 to 1, by the nearest rank; 0 when there are no samples.
func (s Samples) Quantile(q float64) time.Duration {
	if len(s) == 0 {
		return 0
	}
	i := int(q * float64(len(s)))
	return s[min(max(i, 0), len(s)-1)]
}

// Bounds of the samples of one case.
const (
	leastSamples = 3
	mostSamples  = 50_000
)

// Measure does a case once without counting it, then at least three times, until budget has passed, and closes it. It ends
// early, with ctx's error, when ctx ends.
func Measure(ctx context.Context, c Case, budget time.Duration) (s Samples, err error) {
	defer func() { err = errors.Join(err, c.Close()) }()
	if _, err := c.Do(); err != nil {
		return nil, err
	}
	for end := time.Now().Add(budget); len(s) < leastSamples || time.Now().Before(end) && len(s) < mostSamples; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		d, err := c.Do()
		if err != nil {
			return nil, err
		}
		s = append(s, d)
	}
	slices.Sort(s)
	return s, nil
}
