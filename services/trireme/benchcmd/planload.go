package benchcmd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"trireme.dev/services/trireme/compare"
	"trireme.dev/services/trireme/load"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/sched/simulate"
	"trireme.dev/shared/wire"
)

// planned is the load that is planned for: requests that come at one a second on average.
type planned struct {
	what     string  // for people
	rate     float64 // at which they have come; 0: that is not known
	pictures bool    // there are any
	draw     func(seed uint64, n int) []simulate.Request
}

// kindOf is a load of ranges. Each value is as likely, and arrivals are Poisson's.
func kindOf(pictures, prompt, output load.Span, visual int) *planned {
	span := func(s load.Span) [2]int { return [2]int{s.Min, s.Max} }
	text := func(s load.Span) string {
		b, _ := s.MarshalText() // it has no errors
		return string(b)
	}
	what := fmt.Sprintf("%s of %d tokens a request, %s tokens of text, answers of %s", compare.Count(text(pictures)), visual, text(prompt), text(output))
	return &planned{what: what, pictures: pictures.Max > 0, draw: func(seed uint64, n int) []simulate.Request {
		return steadily(seed, n, simulate.Kind{Pictures: span(pictures), Visual: visual, Words: span(prompt), Output: span(output)})
	}}
}

// steadily draws n requests of a kind.
func steadily(seed uint64, n int, k simulate.Kind) []simulate.Request {
	rate, peak := simulate.Steady(1)
	length := time.Duration(n) * 2 * time.Second
	for {
		all, _ := simulate.Draw(seed, []simulate.Phase{{Length: length, Rate: rate, Peak: peak, Kind: k}})
		if len(all) >= n {
			return all[:n]
		}
		length *= 2
	}
}

// recorded is a load of requests that were. Where it is known how they came each seed draws runs of consecutive ones with the gaps before them, as many
// as the root of all (a moving block bootstrap): bursts stay, and chance is not as even as in a record that repeats. Else each is drawn alone, and
// arrivals are Poisson's.
func recorded(file string, all []simulate.Request, timed bool) *planned {
	p := &planned{what: fmt.Sprintf("%d requests of %s", len(all), file)}
	for i := range all {
		p.pictures = p.pictures || all[i].Pictures > 0
	}
	gaps := make([]float64, len(all)) // before each, of a mean of 1
	if timed {
		slices.SortStableFunc(all, func(a, b simulate.Request) int { return cmp.Compare(a.Arrive, b.Arrive) })
		mean := (all[len(all)-1].Arrive - all[0].Arrive).Seconds() / float64(len(all)-1)
		p.rate = 1 / mean
		gaps[0] = 1
		for i := 1; i < len(all); i++ {
			gaps[i] = (all[i].Arrive - all[i-1].Arrive).Seconds() / mean
		}
	}
	p.draw = func(seed uint64, n int) []simulate.Request {
		r := rand.New(rand.NewPCG(seed, 0x4e))
		block, k := int(math.Sqrt(float64(len(all)))), 0
		if !timed {
			block = 1
		}
		out, at := make([]simulate.Request, n), 0.0
		for i := range out {
			if k = (k + 1) % len(all); i%block == 0 {
				k = r.IntN(len(all))
			}
			gap := gaps[k]
			if !timed {
				gap = r.ExpFloat64()
			}
			at += gap
			out[i] = all[k]
			out[i].Arrive = time.Duration(at * float64(time.Second))
		}
		return out
	}
	return p
}

// readRequests reads what bench serve writes with --result, or vllm bench serve, or lines as bench serve's --arrivals reads them, with three more
// columns. What a file does not tell of a request drawn is drawn as flags say.
func readRequests(file string, drawn *planned, pictures load.Span, visual int) (*planned, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("--trace: %w", err)
	}
	var all []simulate.Request
	timed := true
	if text := strings.TrimSpace(string(data)); strings.HasPrefix(text, "{") {
		all, timed, err = results([]byte(text), pictures, visual)
	} else {
		all, err = lines(text, drawn, visual)
	}
	if err == nil && len(all) < 2 {
		err = errors.New("there are fewer than two requests in it")
	}
	if timed = timed && err == nil && slices.ContainsFunc(all, func(r simulate.Request) bool { return r.Arrive != all[0].Arrive }); err != nil {
		return nil, fmt.Errorf("--trace %s: %w%w", file, err, ErrUsage)
	}
	return recorded(file, all, timed), nil
}

// results are the requests of a result of bench serve that were answered.
func results(data []byte, pictures load.Span, visual int) (all []simulate.Request, timed bool, err error) {
	var r struct {
		Inputs  []int     `json:"input_lens"`
		Outputs []int     `json:"output_lens"`
		Starts  []float64 `json:"start_times"`
		Errors  []string  `json:"errors"`
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, false, err
	}
	if len(r.Inputs) == 0 || len(r.Outputs) != len(r.Inputs) {
		return nil, false, errors.New("it has no input_lens and output_lens of as many requests: write it with bench serve --result")
	}
	timed = len(r.Starts) == len(r.Inputs)
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range r.Inputs {
		if i < len(r.Errors) && r.Errors[i] != "" || r.Outputs[i] < 1 {
			continue
		}
		q := simulate.Request{Pictures: pictures.Min + rng.IntN(pictures.Max-pictures.Min+1), Visual: visual, Output: r.Outputs[i]}
		q.Prompt = max(r.Inputs[i], q.Pictures*visual+1)
		if timed {
			q.Arrive = time.Duration(r.Starts[i] * float64(time.Second))
		}
		all = append(all, q)
	}
	return all, timed, nil
}

// lines are requests a line: seconds, and tokens of text, of the answer, and pictures, as far as there are columns.
func lines(text string, drawn *planned, visual int) (all []simulate.Request, err error) {
	n := 0
	for line := range strings.Lines(text) {
		n++
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		columns := strings.FieldsFunc(line, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' })
		at, err := strconv.ParseFloat(columns[0], 64)
		if err != nil || !(at >= 0) || at > 1e6 || len(columns) > 4 {
			return nil, fmt.Errorf("line %d, %.40q: its columns are a time in seconds and, if known, tokens of text, tokens of the answer, pictures", n, line)
		}
		q := drawn.draw(uint64(n), 1)[0]
		words := q.Prompt - q.Pictures*q.Visual
		for i, to := range []*int{&words, &q.Output, &q.Pictures} {
			if i+1 < len(columns) {
				if *to, err = strconv.Atoi(columns[i+1]); err != nil || *to < 0 || *to > 1<<24 {
					return nil, fmt.Errorf("line %d, %.40q: %q is no number of tokens or pictures", n, line, columns[i+1])
				}
			}
		}
		q.Visual, q.Arrive = visual, time.Duration(at*float64(time.Second))
		q.Prompt, q.Output = max(1, words)+q.Pictures*visual, max(1, q.Output)
		all = append(all, q)
	}
	return all, nil
}

// running is the load that the gateways of a running system tell of in a time.
func running(ctx context.Context, url string, observe time.Duration) (*planned, error) {
	b, err := bus.Look(ctx, url, "plan", slog.New(slog.DiscardHandler))
	if errors.Is(err, bus.ErrUnreachable) {
		return nil, fmt.Errorf("%w: start the system with `trireme up`, or say where its NATS is with --nats-url", err)
	}
	if err != nil {
		return nil, err
	}
	defer b.Close()
	gateways, err := b.Gateways(ctx)
	if err != nil {
		return nil, err
	}
	before, err := demands(ctx, b, gateways)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	select {
	case <-time.After(observe):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	after, err := demands(ctx, b, gateways)
	if err != nil {
		return nil, err
	}
	took := time.Since(began)
	var d wire.Demand
	for name, now := range after {
		was, ok := before[name]
		if !ok { // what it has counted is not of this time
			continue
		}
		d.Requests += now.Requests - was.Requests
		d.Pictured += now.Pictured - was.Pictured
		d.Pictures += now.Pictures - was.Pictures
		d.PictureTokens += now.PictureTokens - was.PictureTokens
		d.PromptTokens += now.PromptTokens - was.PromptTokens
		d.Ended += now.Ended - was.Ended
		d.Lengths += now.Lengths - was.Lengths
	}
	if d.Requests == 0 || d.Ended == 0 {
		return nil, fmt.Errorf("in %v %d requests came and %d answers ended: to know what comes it takes some of both; give it more time, as in --from-running 5m", observe, d.Requests, d.Ended)
	}
	return demanded(&d, took), nil
}

// demands are what gateways have counted, by their names.
func demands(ctx context.Context, b *bus.Bus, gateways *bus.Instances) (map[string]wire.Demand, error) {
	asking, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	stats, err := b.Stats(asking, gateways.All())
	if err != nil {
		return nil, err
	}
	all := map[string]wire.Demand{}
	for _, s := range stats {
		if s.Demand != nil {
			all[s.Instance] = *s.Demand
		}
	}
	if len(all) == 0 {
		return nil, cmp.Or(ctx.Err(), errors.New("no gateway tells its demand: is the system running, and --nats-url its NATS?"))
	}
	return all, nil
}

// demanded is the load of a demand: some requests have pictures, all as many but for rounding, all have as much text and equally long answers, as
// counts tell no more.
func demanded(d *wire.Demand, took time.Duration) *planned {
	of := func(a, b uint64) float64 { return float64(a) / float64(max(1, b)) }
	rate, pictured, pictures := float64(d.Requests)/took.Seconds(), of(d.Pictured, d.Requests), of(d.Pictures, d.Pictured)
	visual := int(math.Round(of(d.PictureTokens, d.Pictures)))
	text, output := max(1, int(math.Round(of(d.PromptTokens-d.PictureTokens, d.Requests)))), max(1, int(math.Round(of(d.Lengths, d.Ended))))
	what := fmt.Sprintf("%.2f a second came: %.0f%% with %.1f pictures of %d tokens, %d tokens of text, answers of %d (means: how they vary is not known)",
		rate, 100*pictured, pictures, visual, text, output)
	return &planned{what: what, rate: rate, pictures: d.Pictures > 0, draw: func(seed uint64, n int) []simulate.Request {
		all := steadily(seed, n, simulate.Kind{Words: [2]int{text, text}, Output: [2]int{output, output}})
		r := rand.New(rand.NewPCG(seed, 0xde))
		for i := range all {
			if q := &all[i]; r.Float64() < pictured {
				q.Visual, q.Pictures = visual, int(pictures+r.Float64())
				q.Prompt += q.Pictures * visual
			}
		}
		return all
	}}
}
