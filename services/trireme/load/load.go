// Package load drives an OpenAI-compatible server with a stated load and measures what its clients feel: TTFT, TPOT,
// ITL and E2EL as `vllm bench serve` defines them, so that figures of both can stand side by side.
//
// When requests arrive is decided before the first is sent (arrivals.go), what they say as well (shape.go), both from
// one seed, so a run can be repeated. An open load does not wait for answers: a server that falls behind sees its
// queue grow, as with real users. A closed one keeps a number of requests open.
package load

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"
)

// Config is one run.
type Config struct {
	URL         string            // of the server, without /v1
	Key         string            // API key; "": none is sent
	Model       string            // name to ask for
	Requests    int               // that count, at least 1
	Warmup      int               // before them, one after the other, not counted
	Arrivals    Arrivals          // of an open load; nil: all at once, as far as Concurrency allows
	Concurrency int               // most open requests; 0: no bound
	Shape       Shape             // of requests
	Seed        uint64            // of arrivals and requests
	Timeout     time.Duration     // of one request; 0: 10 minutes
	Progress    func(ended int)   // if not nil, called after each request that counts, not concurrently
	Ended       func(*Sample)     // if not nil, called after each request that counts, with what came of it, not concurrently
	Header      map[string]string // sent with each request
	Begun       func()            // if not nil, called when all is ready and warm, and the clock starts
	Stop        <-chan struct{}   // if not nil, nothing more is sent once it is closed
}

// Validate reports what is wrong with the configuration.
func (c *Config) Validate() error {
	var errs []error
	if c.URL == "" || c.Model == "" {
		errs = append(errs, errors.New("a server and a model have to be named"))
	}
	if c.Requests < 1 || c.Warmup < 0 || c.Concurrency < 0 || c.Timeout < 0 {
		errs = append(errs, fmt.Errorf("%d requests after %d for warm-up, at most %d at once: at least one request, and nothing negative",
			c.Requests, c.Warmup, c.Concurrency))
	}
	return errors.Join(append(errs, c.Shape.Validate())...)
}

// Run sends the load and returns what came back. A request that fails is counted in the report and ends nothing; an
// error is returned when the warm-up fails, since then nothing would be measured, or when ctx ends.
func Run(ctx context.Context, cfg Config) (*Report, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 10 * time.Minute
	}
	// Drawing pictures costs the processors that the server may run on: all bodies are ready before the clock starts.
	bodies, err := cfg.Shape.bodies(ctx, cfg.Model, cfg.Seed, cfg.Warmup+cfg.Requests)
	if err != nil {
		return nil, err
	}
	var offsets []time.Duration
	if cfg.Arrivals != nil {
		if offsets, err = cfg.Arrivals.offsets(cfg.Seed, cfg.Requests); err != nil {
			return nil, err
		}
	}
	c := newClient(&cfg)
	defer c.close()
	for i, body := range bodies[:cfg.Warmup] {
		if s := c.ask(ctx, body); s.Err != nil {
			return nil, fmt.Errorf("warm-up request %d of %d: %w", i+1, cfg.Warmup, s.Err)
		}
	}
	r := &run{cfg: &cfg, client: c}
	if cfg.Begun != nil {
		cfg.Begun()
	}
	begin := time.Now()
	r.send(ctx, begin, bodies[cfg.Warmup:], offsets)
	took := time.Since(begin)
	if ctx.Err() != nil {
		return nil, fmt.Errorf("after %d of %d requests: %w", len(r.samples), cfg.Requests, context.Cause(ctx))
	}
	return newReport(&cfg, r.samples, begin, took), nil
}

// run collects the samples of a run.
type run struct {
	cfg    *Config
	client *client

	mu      sync.Mutex
	samples []Sample
}

// send sends every body at its offset from begin and returns when all have ended.
func (r *run) send(ctx context.Context, begin time.Time, bodies [][]byte, offsets []time.Duration) {
	var wg sync.WaitGroup
	defer wg.Wait()
	var open chan struct{}
	if r.cfg.Concurrency > 0 {
		open = make(chan struct{}, r.cfg.Concurrency)
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for i, body := range bodies {
		due := begin
		if offsets != nil {
			due = begin.Add(offsets[i])
			timer.Reset(time.Until(due))
			select {
			case <-timer.C:
			case <-r.cfg.Stop:
				return
			case <-ctx.Done():
				return
			}
		}
		if open != nil {
			select {
			case open <- struct{}{}:
			case <-ctx.Done():
				return
			}
		}
		wg.Go(func() {
			s := r.client.ask(ctx, body)
			s.Number = i
			if s.Late = 0; offsets != nil {
				s.Late = max(0, s.Sent.Sub(due))
			}
			if open != nil {
				<-open
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			r.samples = append(r.samples, s)
			if r.cfg.Progress != nil {
				r.cfg.Progress(len(r.samples))
			}
			if r.cfg.Ended != nil {
				r.cfg.Ended(&s)
			}
		})
	}
}

// transport is one for all requests of a run: connections are kept, as many as there are open requests.
func transport() *http.Transport {
	return &http.Transport{
		DialContext:         (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		MaxIdleConnsPerHost: 4096,
		MaxIdleConns:        4096,
		DisableCompression:  true,
	}
}
