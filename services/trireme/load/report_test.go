package load

import (
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const ms = time.Millisecond

// sample is a request sent at, whose pieces come at the given times after that; it ends with the last.
func sample(begin time.Time, at time.Duration, output int, pieces ...time.Duration) Sample {
	s := Sample{Sent: begin.Add(at), Input: 10, Output: output, Status: 200, Finish: "length"}
	for _, p := range pieces {
		s.Pieces = append(s.Pieces, s.Sent.Add(p))
	}
	s.TTFT, s.E2EL = pieces[0], pieces[len(pieces)-1]
	for i := 1; i < len(pieces); i++ {
		s.ITLs = append(s.ITLs, pieces[i]-pieces[i-1])
	}
	return s
}

func threeOfFour(t *testing.T) *Report {
	t.Helper()
	begin := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	a, err := ParseArrivals("poisson", 2)
	if err != nil {
		t.Fatal(err)
	}
	return newReport(&Config{Model: "m", Requests: 4, Arrivals: a, Concurrency: 3}, []Sample{
		sample(begin, 1000*ms, 3, 30*ms, 40*ms, 60*ms),
		sample(begin, 0, 5, 10*ms, 20*ms, 30*ms, 40*ms, 50*ms),
		{Sent: begin.Add(20 * ms), E2EL: 5 * ms, Status: 429, Err: errors.New("429: full")},
		sample(begin, 10*ms, 1, 200*ms),
	}, begin, 2*time.Second)
}

// TestReport is worked out by hand from the definitions of vllm bench serve.
func TestReport(t *testing.T) {
	r := threeOfFour(t)
	near := func(what string, got, want float64) {
		t.Helper()
		if math.Abs(got-want) > 1e-9*math.Max(1, math.Abs(want)) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	if r.Completed != 3 || r.Failed != 1 || r.Input != 30 || r.Output != 9 || r.PeakOpen != 3 || r.PeakOutput != 6 {
		t.Errorf("%+v", r)
	}
	near("requests a second", r.RequestRate, 1.5)
	near("tokens a second", r.OutputRate, 4.5)
	near("mean TTFT", r.TTFT.Mean, 80)
	near("median TTFT", r.TTFT.Median, 30)
	near("p99 TTFT", r.TTFT.P99, 30+0.98*170)
	near("std TTFT", r.TTFT.Std, math.Sqrt((70*70+50*50+120*120)/3.0))
	near("mean TPOT", r.TPOT.Mean, (10+15)/2.0) // the request of one token has none
	near("mean ITL", r.ITL.Mean, (4*10+10+20)/6.0)
	near("mean E2EL", r.E2EL.Mean, (50+60+200)/3.0)
	near("share of TTFT up to 30 ms", r.TTFT.Share(30), 2/3.0)
	near("share of TTFT below 10 ms", r.TTFT.Share(9.99), 0)

	for text, want := range map[string]float64{
		"ttft:30": 2, "ttft:29": 1, "tpot:10": 2, "tpot:12 ttft:10": 1, "e2el:1": 0, "ttft:1000 tpot:1000 e2el:1000": 3,
	} {
		g, err := ParseGoodput(strings.Fields(text))
		if err != nil {
			t.Fatal(err)
		}
		near("attainment of "+text, r.Attainment(g), want/4)
	}
	for _, bad := range []string{"ttft", "ttft:", "ttft:x", "ttft:-1", "itl:5", "tpot:0"} {
		if _, err := ParseGoodput([]string{bad}); err == nil {
			t.Errorf("goodput %q was taken", bad)
		}
	}
	if got := r.Failures(5); len(got) != 1 || got[0] != "1 times: 429: full" {
		t.Errorf("%v", got)
	}
}

func TestPercentiles(t *testing.T) {
	v := []float64{1, 2, 4, 8} // numpy.percentile(v, [0, 25, 50, 90, 99, 100])
	for p, want := range map[float64]float64{0: 1, 25: 1.75, 50: 3, 90: 6.8, 99: 7.88, 100: 8} {
		if got := percentile(v, p); math.Abs(got-want) > 1e-12 {
			t.Errorf("percentile %v: %v, want %v", p, got, want)
		}
	}
	if got := percentile([]float64{5}, 99); got != 5 {
		t.Errorf("of one value: %v", got)
	}
}

// TestBlock compares with the layout that tools which read vllm's output expect: 40 columns of name, then the value.
func TestBlock(t *testing.T) {
	var b strings.Builder
	if err := threeOfFour(t).Print(&b, Goodput{TTFT: 30}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"============ Serving Benchmark Result ============\n",
		"Successful requests:                     3         \n",
		"Request rate configured (RPS):           2.00      \n",
		"Request goodput (req/s):                 1.00      \n",
		"Total Token throughput (tok/s):          19.50     \n",
		"---------------Time to First Token----------------\nMean TTFT (ms):                          80.00     \n",
		"-----Time per Output Token (excl. 1st token)------\n",
		"---------------Inter-token Latency----------------\n",
		"----------------End-to-end Latency----------------\n",
		"P99 E2EL (ms):                           197.20    \n==================================================\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the block lacks %q:\n%s", want, &b)
		}
	}
}

func TestResultFile(t *testing.T) {
	data, err := json.Marshal(threeOfFour(t).JSON(Goodput{TTFT: 30}))
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{
		"duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput",
		"output_throughput", "total_token_throughput", "input_lens", "output_lens", "ttfts", "itls", "errors", "request_rate",
		"mean_ttft_ms", "median_tpot_ms", "std_itl_ms", "p99_e2el_ms",
	} {
		if _, ok := m[key]; !ok {
			t.Errorf("no %s in the result", key)
		}
	}
	if got := m["ttfts"].([]any); len(got) != 4 || got[0] != 0.01 || got[2] != 0.0 {
		t.Errorf("ttfts %v: want seconds, in order of sending, 0 for a failed request", got)
	}
}

func TestCapacity(t *testing.T) {
	for want, points := range map[float64][]Point{
		0:   {{1, 0.5}, {2, 0.4}},
		3:   {{1, 1}, {3, 0.95}},
		2.5: {{1, 1}, {2, 0.95}, {3, 0.85}, {4, 0.99}},
	} {
		if got := (&Curve{Points: points}).Capacity(Goal); math.Abs(got-want) > 1e-9 {
			t.Errorf("%v: capacity %v, want %v", points, got, want)
		}
	}
}

func TestPlot(t *testing.T) {
	curves := []Curve{{"1E1P1D", []Point{{1, 1}, {2, 0.8}}}, {"2EPD", []Point{{1, 0.9}, {2, 0.6}}}}
	for name, magic := range map[string]string{"a.svg": "<?xml", "b.png": "\x89PNG"} {
		path := filepath.Join(t.TempDir(), name)
		if err := Plot(path, "attainment", Goal, curves); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil || !strings.HasPrefix(string(data), magic) || len(data) < 1000 {
			t.Errorf("%s: %d bytes, %.10q, %v", name, len(data), data, err)
		}
	}
	if err := Plot(filepath.Join(t.TempDir(), "c.txt"), "", Goal, curves); err == nil {
		t.Error("a plot was written as text")
	}
}

// Errors that differ in numbers only are one, of another status they are not.
func TestFailuresAlike(t *testing.T) {
	var r Report
	for _, text := range []string{"429: 3 wait, 1.5 MiB", "503: 3 wait, 1.5 MiB", "429: 1024 wait, 9 MiB", "eof"} {
		r.Samples = append(r.Samples, Sample{Err: errors.New(text)})
	}
	want := []string{"2 times: 429: 3 wait, 1.5 MiB", "1 times: 503: 3 wait, 1.5 MiB", "1 times: eof"}
	if got := r.Failures(5); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
