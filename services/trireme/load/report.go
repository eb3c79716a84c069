package load

import (
	"fmt"
	"io"
	"math"
	"regexp"
	"slices"
	"sort"
	"strings"
	"time"

	"gonum.org/v1/gonum/stat"
)

// Summary describes a quantity over all requests that succeeded, in milliseconds: Percentiles are linear between the two
// nearest values, as numpy's.
type Summary struct {
	Mean, Median, Std, P90, P99 float64
	values                      []float64 // sorted
}

func summarise(all []time.Duration) Summary {
	if len(all) == 0 {
		return Summary{}
	}
	v := make([]float64, len(all))
	for i, d := range all {
		v[i] = d.Seconds() * 1e3
	}
	slices.Sort(v)
	mean, std := stat.PopMeanStdDev(v, nil)
	return Summary{Mean: mean, Std: std, Median: percentile(v, 50), P90: percentile(v, 90), P99: percentile(v, 99), values: v}
}

// percentile is the p-th percentile of rising values.
func percentile(v []float64, p float64) float64 {
	at := p / 100 * float64(len(v)-1)
	low := int(at)
	if low+1 >= len(v) {
		return v[len(v)-1]
	}
	return v[low] + (at-float64(low))*(v[low+1]-v[low])
}

// Share is the share of values, 0 to 1, that are at most bound milliseconds.
func (s *Summary) Share(bound float64) float64 {
	if len(s.values) == 0 {
		return 0
	}
	return float64(sort.SearchFloat64s(s.values, math.Nextafter(bound, math.Inf(1)))) / float64(len(s.values))
}

// Report is what a run has shown.
type Report struct {
	Config   *Config
	Began    time.Time
	Duration time.Duration // from the first request to the last answer's end
	Samples  []Sample      // in order of sending

	Completed, Failed             int
	Input, Output, Cached         int // tokens of the requests that succeeded
	TTFT, TPOT, ITL, E2EL         Summary
	PeakOutput                    int     // tokens in the best second
	PeakOpen                      int     // requests open at once
	Late                          Summary // of all requests of an open load
	RequestRate, OutputRate, Rate float64 // a second: requests, output tokens, all tokens
}

func newReport(cfg *Config, samples []Sample, began time.Time, took time.Duration) *Report {
	slices.SortFunc(samples, func(a, b Sample) int { return a.Sent.Compare(b.Sent) })
	r := &Report{Config: cfg, Began: began, Duration: took, Samples: samples}
	var ttft, tpot, itl, e2el, late []time.Duration
	perSecond := map[int]float64{}
	type edge struct {
		at time.Time
		by int
	}
	var edges []edge
	for i := range samples {
		s := &samples[i]
		late = append(late, s.Late)
		edges = append(edges, edge{s.Sent, 1}, edge{s.Sent.Add(s.E2EL), -1})
		if s.Err != nil {
			r.Failed++
			continue
		}
		r.Completed++
		r.Input, r.Output, r.Cached = r.Input+s.Input, r.Output+s.Output, r.Cached+s.Cached
		ttft, itl, e2el = append(ttft, s.TTFT), append(itl, s.ITLs...), append(e2el, s.E2EL)
		if d, ok := s.TPOT(); ok {
			tpot = append(tpot, d)
		}
		for _, at := range s.Pieces { // a piece may be several tokens; they share the request's evenly
			perSecond[int(at.Sub(began)/time.Second)] += float64(s.Output) / float64(len(s.Pieces))
		}
	}
	slices.SortFunc(edges, func(a, b edge) int {
		if d := a.at.Compare(b.at); d != 0 {
			return d
		}
		return a.by - b.by
	})
	open := 0
	for _, e := range edges {
		open += e.by
		r.PeakOpen = max(r.PeakOpen, open)
	}
	for _, n := range perSecond {
		r.PeakOutput = max(r.PeakOutput, int(math.Round(n)))
	}
	r.TTFT, r.TPOT, r.ITL, r.E2EL, r.Late = summarise(ttft), summarise(tpot), summarise(itl), summarise(e2el), summarise(late)
	seconds := took.Seconds()
	r.RequestRate, r.OutputRate = float64(r.Completed)/seconds, float64(r.Output)/seconds
	r.Rate = float64(r.Input+r.Output) / seconds
	return r
}

// Goodput is what a request has to keep to be a good one, in milliseconds; 0: no bound.
type Goodput struct{ TTFT, TPOT, E2EL float64 }

// ParseGoodput reads bounds as --goodput takes them, in milliseconds: ttft:500, tpot:50 and e2el:5000, in any number.
func ParseGoodput(bounds []string) (Goodput, error) {
	var g Goodput
	for _, b := range bounds {
		name, value, _ := strings.Cut(b, ":")
		to := map[string]*float64{"ttft": &g.TTFT, "tpot": &g.TPOT, "e2el": &g.E2EL}[name]
		if to == nil {
			return g, fmt.Errorf("goodput bound %q: there are ttft:MS, tpot:MS and e2el:MS", b)
		}
		if _, err := fmt.Sscanf(value, "%g", to); err != nil || !(*to > 0) {
			return g, fmt.Errorf("goodput bound %q: %q is no number of milliseconds above 0", b, value)
		}
	}
	return g, nil
}

// None reports whether there is no bound at all.
func (g Goodput) None() bool { return g == Goodput{} }

// Met reports whether a request succeeded within all bounds. One token has no TPOT, so it keeps any.
func (g Goodput) Met(s *Sample) bool {
	within := func(d time.Duration, bound float64) bool { return bound == 0 || d.Seconds()*1e3 <= bound }
	tpot, _ := s.TPOT()
	return s.Err == nil && within(s.TTFT, g.TTFT) && within(tpot, g.TPOT) && within(s.E2EL, g.E2EL)
}

// Attainment is the share of all requests sent, 0 to 1, that g counts as good; one that failed is not.
func (r *Report) Attainment(g Goodput) float64 {
	if len(r.Samples) == 0 {
		return 0
	}
	return float64(r.good(g)) / float64(len(r.Samples))
}

func (r *Report) good(g Goodput) int {
	n := 0
	for i := range r.Samples {
		if g.Met(&r.Samples[i]) {
			n++
		}
	}
	return n
}

// Print writes the report as vllm bench serve prints its own, with what else there is to say below.
func (r *Report) Print(w io.Writer, g Goodput) error {
	var b strings.Builder
	title := func(s string, fill byte) { b.WriteString(centre(s, fill) + "\n") }
	whole := func(name string, n int) { fmt.Fprintf(&b, "%-40s %-10d\n", name, n) }
	number := func(name string, x float64) { fmt.Fprintf(&b, "%-40s %-10.2f\n", name, x) }
	title(" Serving Benchmark Result ", '=')
	whole("Successful requests:", r.Completed)
	whole("Failed requests:", r.Failed)
	if c := r.Config.Concurrency; c > 0 {
		whole("Maximum request concurrency:", c)
	}
	if a := r.Config.Arrivals; a != nil {
		number("Request rate configured (RPS):", a.Rate())
	}
	number("Benchmark duration (s):", r.Duration.Seconds())
	whole("Total input tokens:", r.Input)
	whole("Total generated tokens:", r.Output)
	number("Request throughput (req/s):", r.RequestRate)
	if !g.None() {
		number("Request goodput (req/s):", float64(r.good(g))/r.Duration.Seconds())
	}
	number("Output token throughput (tok/s):", r.OutputRate)
	whole("Peak output token throughput (tok/s):", r.PeakOutput)
	whole("Peak concurrent requests:", r.PeakOpen)
	number("Total Token throughput (tok/s):", r.Rate)
	for _, q := range r.quantities() {
		title(q.title, '-')
		for _, v := range q.values() {
			number(fmt.Sprintf("%s %s (ms):", v.name, q.name), v.value)
		}
	}
	title("", '=')
	_, err := io.WriteString(w, b.String())
	return err
}

// centre puts s into the middle of a line of fill, 50 wide.
func centre(s string, fill byte) string {
	const width = 50
	left := (width - len(s)) / 2
	return strings.Repeat(string(fill), left) + s + strings.Repeat(string(fill), width-len(s)-left)
}

// quantity is one of the four that are reported alike.
type quantity struct {
	name, title string
	Summary
}

func (r *Report) quantities() []quantity {
	return []quantity{
		{"TTFT", "Time to First Token", r.TTFT},
		{"TPOT", "Time per Output Token (excl. 1st token)", r.TPOT},
		{"ITL", "Inter-token Latency", r.ITL},
		{"E2EL", "End-to-end Latency", r.E2EL},
	}
}

type named struct {
	name  string
	value float64
}

func (q quantity) values() []named {
	return []named{{"Mean", q.Mean}, {"Median", q.Median}, {"P90", q.P90}, {"P99", q.P99}}
}

// JSON is the report under the keys of vllm bench serve's result file, and some more.
func (r *Report) JSON(g Goodput) map[string]any {
	m := map[string]any{
		"date": r.Began.Format("20060102-150405"), "endpoint_type": "openai-chat", "model_id": r.Config.Model,
		"num_prompts": r.Config.Requests, "duration": r.Duration.Seconds(),
		"completed": r.Completed, "failed": r.Failed,
		"total_input_tokens": r.Input, "total_output_tokens": r.Output, "total_cached_tokens": r.Cached,
		"request_throughput": r.RequestRate, "output_throughput": r.OutputRate, "total_token_throughput": r.Rate,
		"max_output_tokens_per_s": r.PeakOutput, "max_concurrent_requests": r.PeakOpen,
		"seed": r.Config.Seed, "p99_late_ms": r.Late.P99,
	}
	if a := r.Config.Arrivals; a != nil {
		m["request_rate"], m["arrivals"] = a.Rate(), a.String()
	} else {
		m["request_rate"] = "inf"
	}
	if c := r.Config.Concurrency; c > 0 {
		m["max_concurrency"] = c
	}
	if !g.None() {
		m["request_goodput"] = float64(r.good(g)) / r.Duration.Seconds()
		m["slo_attainment"] = r.Attainment(g)
	}
	for _, q := range r.quantities() {
		name := strings.ToLower(q.name)
		for _, v := range append(q.values(), named{"Std", q.Std}) {
			m[strings.ToLower(v.name)+"_"+name+"_ms"] = v.value
		}
	}
	var in, out []int
	var ttfts, starts []float64
	var itls [][]float64
	var failures []string
	for i := range r.Samples {
		s := &r.Samples[i]
		gaps := make([]float64, len(s.ITLs))
		for k, d := range s.ITLs {
			gaps[k] = d.Seconds()
		}
		why := ""
		if s.Err != nil {
			why = s.Err.Error()
		}
		in, out, ttfts = append(in, s.Input), append(out, s.Output), append(ttfts, s.TTFT.Seconds())
		starts = append(starts, s.Sent.Sub(r.Began).Seconds())
		itls, failures = append(itls, gaps), append(failures, why)
	}
	m["input_lens"], m["output_lens"], m["ttfts"], m["itls"], m["errors"] = in, out, ttfts, itls, failures
	m["start_times"] = starts
	return m
}

var number = regexp.MustCompile(`[0-9]+(\.[0-9]+)?`)

// Failures counts the errors of requests by their text, those that differ in numbers only together, the commonest first, at most n of them.
func (r *Report) Failures(n int) []string {
	count, alike := map[string]int{}, map[string]string{}
	for i := range r.Samples {
		if err := r.Samples[i].Err; err != nil {
			status, text, _ := strings.Cut(err.Error(), ": ")
			kind := status + ": " + number.ReplaceAllString(text, "0")
			if alike[kind] == "" {
				alike[kind] = err.Error()
			}
			count[alike[kind]]++
		}
	}
	texts := make([]string, 0, len(count))
	for t := range count {
		texts = append(texts, t)
	}
	slices.SortFunc(texts, func(a, b string) int {
		if d := count[b] - count[a]; d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	for i, t := range texts {
		texts[i] = fmt.Sprintf("%d times: %s", count[t], t)
	}
	return texts[:min(n, len(texts))]
}
