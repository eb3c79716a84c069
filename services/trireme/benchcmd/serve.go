package benchcmd

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"

	"trireme.dev/services/trireme/load"
)

// Serve is `trireme bench serve`.
type Serve struct {
	URL    string `name:"url" help:"Server: any that speaks OpenAI's API." default:"http://127.0.0.1:8080"`
	APIKey string `name:"api-key" help:"API key, if the server wants one; of several with commas between the first. Better in the environment." env:"TRIREME_API_KEY,OPENAI_API_KEY" placeholder:"KEY"`
	Model  string `help:"Model name; by default the server's first." placeholder:"NAME"`

	Requests    int       `help:"Requests that count." default:"200"`
	Warmup      int       `help:"Requests before them that do not." default:"4"`
	Rate        []float64 `help:"Open load: requests a second. Several (1,2,4) are run one after the other." placeholder:"N"`
	Arrivals    string    `help:"Of an open load: poisson, gamma:B (B below 1 is burstier), bursts:N, constant, or file:PATH with a time in seconds on each line." default:"poisson"`
	Concurrency int       `help:"Most requests open at once. Without --rate: a closed load of so many, by default 8." placeholder:"N"`
	Seed        uint64    `help:"Of arrivals and requests: the same seed is the same load."`

	Words    load.Span   `help:"Words of a question." default:"8-24" placeholder:"N-M"`
	Question string      `help:"The same question for all, instead of random words." placeholder:"TEXT"`
	Output   load.Span   `help:"Tokens of an answer." default:"32-96" placeholder:"N-M"`
	Stop     bool        `help:"Let the model end its answers; --output is then the most."`
	Pictures load.Span   `help:"Pictures of a request, drawn by program." default:"0" placeholder:"N-M"`
	Size     []load.Size `help:"Sizes of pictures, each as likely." default:"224x224" placeholder:"WxH"`
	Repeat   float64     `help:"Chance that a picture is one of eight that many requests have." placeholder:"P"`
	System   string      `help:"System message that all requests begin with." placeholder:"TEXT"`
	Prefixes int         `help:"System messages that requests begin with, each as likely; with --prefix-words." placeholder:"N"`
	Prefix   int         `name:"prefix-words" help:"Words of each of --prefixes." placeholder:"N"`
	Extra    []string    `help:"More fields of the request; may be repeated." placeholder:"NAME=JSON" sep:"none"`

	Goodput []string `help:"Bounds that a good request keeps, in milliseconds." placeholder:"ttft:MS,tpot:MS,e2el:MS"`
	JSON    bool     `name:"json" help:"Write the result under vllm's keys instead of its block; with several rates a list."`
	Result  string   `help:"Write that to a file besides." placeholder:"FILE" type:"path"`
	Plot    string   `help:"Draw attainment of --goodput against rate; the ending is .svg or .png." placeholder:"FILE" type:"path"`
}

// Help is shown by `trireme bench serve --help`.
func (Serve) Help() string {
	return `Sends a stated load and reports what clients feel, in the block and under the JSON keys of ` + "`vllm bench serve`" + `: TTFT, TPOT
(without the first token), ITL, E2EL, throughput, goodput. The load generator takes processor time itself: run it on another
machine, or say so beside the figures.

Examples:
  trireme bench serve                                                a closed load, 8 at once, text only
  trireme bench serve --rate 4 --pictures 1-4 --goodput ttft:500,tpot:50
  trireme bench serve --rate 1,2,4,8 --goodput ttft:500,tpot:50 --plot attainment.svg
  trireme bench serve --rate 4 --arrivals gamma:0.5 --json > bursty.json
  trireme bench serve --url http://10.0.0.7:8000 --model Qwen/Qwen3-VL-30B-A3B-Instruct --concurrency 32`
}

// Run sends the load, once for each rate, and prints what came of it.
func (c *Serve) Run(e Env) error {
	c.APIKey, _, _ = strings.Cut(c.APIKey, ",")
	goodput, err := load.ParseGoodput(c.Goodput)
	if err != nil {
		return fmt.Errorf("--goodput: %w%w", err, ErrUsage)
	}
	if c.Plot != "" && (goodput.None() || len(c.Rate) < 2) {
		return fmt.Errorf("--plot draws attainment against rate: give --goodput and at least two rates, as in --rate 1,2,4%w", ErrUsage)
	}
	loads, err := c.loads()
	if err != nil {
		return err
	}
	first, paced, err := c.firstModel(e)
	switch {
	case c.Model != "":
	case err != nil:
		return err
	default:
		c.Model = first
	}
	if paced != "" {
		fmt.Fprintf(e.Err, "note: the NPUs are paced as %s: figures are of that profile, not of a machine\n", paced)
	}
	curve := load.Curve{Name: c.Model}
	var results []map[string]any
	for _, l := range loads {
		r, err := c.one(e, l)
		if err != nil {
			return err
		}
		if !c.JSON {
			if err := r.Print(e.Out, goodput); err != nil {
				return err
			}
			if paced != "" {
				fmt.Fprintf(e.Out, "NPUs paced as %s\n", paced)
			}
		}
		for _, f := range r.Failures(5) {
			fmt.Fprintln(e.Err, "failed", f)
		}
		if l.Arrivals != nil && r.Late.P99 > 10 {
			fmt.Fprintf(e.Err, "note: 1%% of the requests were sent %.0f ms late or later: the load generator had no time, or --concurrency held them back\n", r.Late.P99)
		}
		result := r.JSON(goodput)
		if paced != "" {
			result["paced"] = paced
		}
		results = append(results, result)
		if l.Arrivals != nil {
			curve.Points = append(curve.Points, load.Point{Rate: l.Arrivals.Rate(), Attainment: r.Attainment(goodput)})
		}
		if r.Completed == 0 {
			return fmt.Errorf("none of %d requests succeeded: %s", r.Failed, strings.Join(r.Failures(1), ""))
		}
	}
	if len(curve.Points) > 1 && !goodput.None() && !c.JSON {
		fmt.Fprintf(e.Out, "%.0f%% of requests keep their bounds up to %.2f requests a second\n", load.Goal*100, curve.Capacity(load.Goal))
	}
	if c.Plot != "" {
		if err := load.Plot(c.Plot, c.title(paced), load.Goal, []load.Curve{curve}); err != nil {
			return err
		}
	}
	return c.write(e, results)
}

// title is the plot's.
func (c *Serve) title(paced string) string {
	title := strings.Join(c.Goodput, ", ") + " (ms)"
	if paced != "" {
		title += ", NPUs paced as " + paced
	}
	return title
}

// loads are the runs that the flags ask for, rates rising.
func (c *Serve) loads() ([]load.Config, error) {
	base := load.Config{
		URL: c.URL, Key: c.APIKey, Model: c.Model, Requests: c.Requests, Warmup: c.Warmup, Concurrency: c.Concurrency, Seed: c.Seed,
		Shape: load.Shape{
			Words: c.Words, Output: c.Output, Stop: c.Stop, Pictures: c.Pictures, Sizes: c.Size, Repeat: c.Repeat, Question: c.Question,
			System: c.System, Prefixes: c.Prefixes, Prefix: c.Prefix, Extra: c.Extra,
		},
	}
	check := base
	if check.Model == "" {
		check.Model = "to be asked for"
	}
	if err := check.Validate(); err != nil {
		return nil, fmt.Errorf("%w%w", err, ErrUsage)
	}
	rates := slices.Clone(c.Rate)
	slices.Sort(rates)
	fromFile := strings.HasPrefix(c.Arrivals, "file:")
	switch {
	case fromFile && len(rates) > 0:
		return nil, fmt.Errorf("--arrivals %s says when requests arrive: leave --rate out%w", c.Arrivals, ErrUsage)
	case fromFile:
		rates = []float64{0}
	case len(rates) == 0:
		if c.Arrivals != "poisson" {
			return nil, fmt.Errorf("--arrivals %s needs a --rate%w", c.Arrivals, ErrUsage)
		}
		if base.Concurrency == 0 {
			base.Concurrency = 8
		}
		return []load.Config{base}, nil
	}
	var all []load.Config
	for _, rate := range rates {
		a, err := load.ParseArrivals(c.Arrivals, rate)
		if err != nil {
			return nil, fmt.Errorf("%w%w", err, ErrUsage)
		}
		one := base
		one.Arrivals = a
		if fromFile {
			one.Requests = load.Len(a)
		}
		all = append(all, one)
	}
	return all, nil
}

// firstModel asks the server which models it has, and a Trireme whether its NPUs are slowed down to a profile.
func (c *Serve) firstModel(e Env) (name, paced string, _ error) {
	client := openai.NewClient(option.WithBaseURL(load.Base(c.URL)+"/v1"), option.WithAPIKey(c.APIKey), option.WithMaxRetries(0))
	page, err := client.Models.List(e.Context)
	var api *openai.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return "", "", fmt.Errorf("nothing listens at %s: start it with `trireme up`, or say where with --url", c.URL)
	case errors.As(err, &api) && api.StatusCode == http.StatusUnauthorized:
		return "", "", fmt.Errorf("%s wants another API key, or one at all: give it with --api-key, TRIREME_API_KEY or OPENAI_API_KEY (%d)", c.URL, api.StatusCode)
	case errors.As(err, &api) && api.Message != "": // which its text leaves out
		return "", "", fmt.Errorf("asking %s for its models: %s (%d)", c.URL, api.Message, api.StatusCode)
	case err != nil:
		return "", "", fmt.Errorf("asking %s for its models: %w", c.URL, err)
	case len(page.Data) == 0:
		return "", "", fmt.Errorf("the server at %s has no model", c.URL)
	}
	if raw := page.Data[0].JSON.ExtraFields["paced"].Raw(); raw != "" {
		if err := json.Unmarshal([]byte(raw), &paced); err != nil {
			return "", "", fmt.Errorf("asking %s for its models: paced is %s: %w", c.URL, raw, err)
		}
	}
	return page.Data[0].ID, paced, nil
}

// one runs one load, with a progress bar for people.
func (c *Serve) one(e Env, l load.Config) (*load.Report, error) {
	l.Model = c.Model
	what := fmt.Sprintf("%d at once", l.Concurrency)
	if l.Arrivals != nil {
		what = fmt.Sprintf("%.4g requests/s", l.Arrivals.Rate())
	}
	next, end := progress(e.Err, l.Requests)
	defer end()
	begin := time.Now()
	l.Progress = func(ended int) {
		next(fmt.Sprintf("%s, %.1f answers/s", what, float64(ended)/time.Since(begin).Seconds()))
	}
	return load.Run(e.Context, l)
}

// write writes the results as JSON where they are wanted.
func (c *Serve) write(e Env, results []map[string]any) error {
	var all any = results
	if len(results) == 1 {
		all = results[0]
	}
	data, err := json.Marshal(all)
	if err != nil {
		return fmt.Errorf("writing the result: %w", err)
	}
	data = append(data, '\n')
	if c.Result != "" {
		if err := os.WriteFile(c.Result, data, 0o644); err != nil {
			return fmt.Errorf("writing the result: %w", err)
		}
	}
	if c.JSON {
		_, err = e.Out.Write(data)
	}
	return err
}
