package benchcmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"trireme.dev/services/trireme/load"
	"trireme.dev/services/trireme/standin"
	"trireme.dev/shared/obs"
	"trireme.dev/shared/stage"
)

// ControlReport is what Control writes with --json. Times are in milliseconds.
type ControlReport struct {
	Version  string       `json:"version"`
	CPUs     int          `json:"cpus"`
	Stages   string       `json:"stages"`
	Streams  int          `json:"streams"`
	Step     float64      `json:"step_ms"`
	Decoders int          `json:"decoders"`
	Together bool         `json:"together"` // decoders take their steps at the same moments
	Hops     []Hop        `json:"hops"`
	Traffic  []Traffic    `json:"traffic"`
	Load     *ControlLoad `json:"load"`
}

// Hop is the time from one point of a request's way to another.
type Hop struct {
	Name    string  `json:"name"`
	Samples int     `json:"samples"`
	P50     float64 `json:"p50_ms"`
	P99     float64 `json:"p99_ms"`
}

// Traffic is what a request sends over NATS: what clients publish to the server, acknowledgements and pulls included.
type Traffic struct {
	Request  string  `json:"request"`
	Messages float64 `json:"messages"`
	Bytes    float64 `json:"bytes"`
	Out      float64 `json:"delivered_messages"`
	OutBytes float64 `json:"delivered_bytes"`
}

// ControlLoad is the run with many streams.
type ControlLoad struct {
	Seconds float64 `json:"seconds"`
	Tokens  int     `json:"tokens"`
	Rate    float64 `json:"tokens_per_s"`
	P50     float64 `json:"delay_p50_ms"` // from the moment at which a stage had the token to the client's read of its event
	P99     float64 `json:"delay_p99_ms"`
	Max     float64 `json:"delay_max_ms"`
	CPU     []CPU   `json:"cpu"`
}

// CPU is the processor time of processes during the load.
type CPU struct {
	Name  string  `json:"name"`
	Cores float64 `json:"cores"`
	Token float64 `json:"us_per_token"`
}

const standIns = "stand-ins that compute nothing and answer at once"

// measure makes the report.
func (s *system) measure(e Env, c *Control, r *ControlReport) error {
	r.Version, r.CPUs, r.Stages = obs.Version(), runtime.NumCPU(), standIns
	client := newStreamer(s.url)
	defer client.http.CloseIdleConnections()
	next, end := progress(e.Err, 4)
	defer end()
	picture, err := pictureBody(4)
	if err != nil {
		return err
	}
	text := textBody(4)
	for _, body := range [][]byte{text, picture} { // connections, code and caches are warm
		for range 20 {
			if _, err := client.ask(s.ctx, body, 4, nil); err != nil {
				return fmt.Errorf("warming up: %w", err)
			}
		}
	}
	next("hops, text")
	if err := s.hops(client, text, "text", c.Requests, r); err != nil {
		return err
	}
	next("hops, a picture")
	if err := s.hops(client, picture, "a picture", c.Requests, r); err != nil {
		return err
	}
	next("many streams")
	if r.Load, err = s.load(client, c); err != nil {
		return fmt.Errorf("with %d streams: %w", c.Streams, err)
	}
	next("done")
	return nil
}

// body is a request for so many tokens.
func body(content any, tokens int) []byte {
	data, err := json.Marshal(map[string]any{
		"model": "shapes-vl-moe", "stream": true, "max_tokens": tokens, "temperature": 0, "ignore_eos": true,
		"messages": []any{map[string]any{"role": "user", "content": content}},
	})
	if err != nil {
		panic("BUG: a request cannot be written: " + err.Error())
	}
	return data
}

func textBody(tokens int) []byte {
	return body("Count from 3 to 57, and say which of these are prime.", tokens)
}

func pictureBody(tokens int) ([]byte, error) {
	url, err := load.Picture(load.Size{W: 224, H: 224}, 1)
	if err != nil {
		return nil, err
	}
	return body([]any{
		map[string]any{"type": "image_url", "image_url": map[string]any{"url": url}},
		map[string]any{"type": "text", "text": "Describe the image."},
	}, tokens), nil
}

// hops sends requests one after the other and adds what became of them to the report.
func (s *system) hops(client *streamer, body []byte, name string, requests int, r *ControlReport) error {
	if _, err := s.notes(); err != nil {
		return err
	}
	idle := time.Second
	quiet, err := s.traffic(idle, nil)
	if err != nil {
		return err
	}
	var answers []*streamed
	begin := time.Now()
	sum, err := s.traffic(0, func() error {
		for range requests {
			a, err := client.ask(s.ctx, body, 4, nil)
			if err != nil {
				return err
			}
			answers = append(answers, a)
		}
		return nil
	})
	if err != nil {
		return err
	}
	scale := time.Since(begin).Seconds() / idle.Seconds() // heartbeats and the like go on meanwhile
	r.Traffic = append(r.Traffic, sum.minus(quiet, scale).of(name+", 4 tokens", float64(requests)))
	notes, err := s.notes()
	if err != nil {
		return err
	}
	r.Hops = append(r.Hops, hopsOf(name, answers, notes)...)
	return nil
}

// hopsOf joins what clients and stages noted.
func hopsOf(name string, answers []*streamed, notes map[string][]standin.Diary) []Hop {
	index := func(role string) map[string]standin.Part {
		m := make(map[string]standin.Part)
		for _, d := range notes[role] {
			for _, p := range d.Parts {
				m[p.Request] = p
			}
		}
		return m
	}
	encode, prefill, decode := index(stage.Encode), index(stage.Prefill), index(stage.Decode)
	var toEncode, toPrefill, queue, token, first []float64
	for _, a := range answers {
		p, ok := prefill[a.id]
		if !ok {
			continue
		}
		if e, ok := encode[a.id]; ok {
			toEncode = append(toEncode, millis(e.Taken-a.sent))
			toPrefill = append(toPrefill, millis(p.Taken-e.Passed))
		} else {
			toPrefill = append(toPrefill, millis(p.Taken-a.sent))
		}
		if d, ok := decode[a.id]; ok {
			queue = append(queue, millis(d.Taken-p.Passed))
		}
		token = append(token, millis(a.tokens[0]-p.Token))
		first = append(first, millis(a.tokens[0]-a.sent))
	}
	var hops []Hop
	add := func(what string, v []float64) {
		if len(v) > 0 {
			hops = append(hops, Hop{Name: name + ": " + what, Samples: len(v), P50: quantile(v, 0.5), P99: quantile(v, 0.99)})
		}
	}
	if len(toEncode) > 0 {
		add("client sends -> encode takes", toEncode)
		add("encode is done -> join -> prefill takes", toPrefill)
	} else {
		add("client sends -> prefill takes", toPrefill)
	}
	add("prefill is done -> decode takes", queue)
	add("a stage has a token -> client reads it", token)
	add("all: time to first token", first)
	return hops
}

func millis(ns int64) float64 { return float64(ns) / 1e6 }

// quantile sorts v.
func quantile(v []float64, q float64) float64 {
	slices.Sort(v)
	return v[min(int(q*float64(len(v))), len(v)-1)]
}

// load opens the streams and measures while all are open.
func (s *system) load(client *streamer, c *Control) (*ControlLoad, error) {
	if _, err := s.notes(); err != nil {
		return nil, err
	}
	// Streams begin one after the other; what each one has to say is longer than the ramp and the measured time together.
	const (
		apart = 2 * time.Millisecond
		spare = 4 * time.Second
	)
	ramp := time.Duration(c.Streams) * apart
	tokens := int((2*ramp+c.Time+spare)/c.Step) + 2
	if tokens > 7000 {
		return nil, fmt.Errorf("answers of %d tokens are too long: take a longer --step or a shorter --time%w", tokens, ErrUsage)
	}
	text := textBody(tokens)
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	answers := make([]*streamed, c.Streams)
	firsts := make(chan struct{}, c.Streams)
	group.Go(func() error {
		for i := range c.Streams {
			group.Go(func() (err error) {
				answers[i], err = client.ask(ctx, text, tokens, func() { firsts <- struct{}{} })
				return err
			})
			select {
			case <-time.After(apart):
			case <-ctx.Done():
				return nil
			}
		}
		return nil
	})
	open := 0
	for open < c.Streams {
		select {
		case <-firsts:
			open++
		case <-ctx.Done():
			return nil, group.Wait()
		}
	}
	time.Sleep(time.Second) // what opening them cost is over
	from, before := time.Now(), s.cpu()
	select {
	case <-time.After(c.Time):
	case <-ctx.Done():
		return nil, group.Wait()
	}
	to, after := time.Now(), s.cpu()
	if err := group.Wait(); err != nil {
		return nil, err
	}
	notes, err := s.notes()
	if err != nil {
		return nil, err
	}
	used := make(map[string]float64)
	for name, t := range after {
		used[name] = (t - before[name]) / to.Sub(from).Seconds()
	}
	return loadOf(answers, notes, from.UnixNano(), to.UnixNano(), used)
}

// loadOf joins what clients and decoders noted of the tokens that were there between two times, Unix times in nanoseconds, and
// while all streams were open; cores are the processors in use meanwhile.
func loadOf(answers []*streamed, notes map[string][]standin.Diary, from, to int64, cores map[string]float64) (*ControlLoad, error) {
	type made struct {
		first int
		steps []int64
	}
	by := make(map[string]made)
	for _, d := range notes[stage.Decode] {
		for _, p := range d.Parts {
			by[p.Request] = made{p.First, d.Steps}
		}
	}
	for _, a := range answers {
		from, to = max(from, a.tokens[0]), min(to, a.tokens[len(a.tokens)-1])
	}
	if from >= to {
		return nil, errors.New("at no time were all streams open: this machine is too slow for so many")
	}
	var delays []float64
	for _, a := range answers {
		m, ok := by[a.id]
		if !ok {
			return nil, fmt.Errorf("BUG: no stand-in knows of request %s", a.id)
		}
		if m.first+len(a.tokens)-1 > len(m.steps) {
			return nil, fmt.Errorf("BUG: %d tokens after step %d of %d", len(a.tokens), m.first, len(m.steps))
		}
		for i, came := range a.tokens[1:] {
			if at := m.steps[m.first+i]; at >= from && at < to {
				delays = append(delays, millis(came-at))
			}
		}
	}
	if len(delays) == 0 {
		return nil, errors.New("no token came while all streams were open")
	}
	l := &ControlLoad{Seconds: float64(to-from) / 1e9, Tokens: len(delays)}
	l.Rate = float64(l.Tokens) / l.Seconds
	l.P50, l.P99 = quantile(delays, 0.5), quantile(delays, 0.99)
	l.Max = delays[len(delays)-1]
	for _, name := range []string{"gateway", "nats", "stages (stand-ins)", "hmm", "load client", others} {
		l.CPU = append(l.CPU, CPU{Name: name, Cores: cores[name], Token: cores[name] / l.Rate * 1e6})
	}
	return l, nil
}

// cpu is the processor time so far in seconds, by what it is booked to.
func (s *system) cpu() map[string]float64 {
	used := make(map[string]float64)
	for _, p := range s.procs {
		used[p.name] += cpuOf(p.pid)
	}
	var own unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &own) == nil {
		used["load client"] = time.Duration(own.Utime.Nano() + own.Stime.Nano()).Seconds()
	}
	all := machine()
	for _, t := range used {
		all -= t
	}
	used[others] = all
	return used
}

// others is the processor time of all processes that are no part of the run: what they take is missing to it.
const others = "other processes"

// machine is the processor time of all processes so far, in seconds: user, nice, system, irq and softirq in the first line of
// /proc/stat, in ticks of 10 ms (proc(5)).
func machine() (seconds float64) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(text), "\n")
	for i, f := range strings.Fields(line) {
		if n, err := strconv.ParseFloat(f, 64); err == nil && (i <= 3 || i == 6 || i == 7) {
			seconds += n / 100
		}
	}
	return seconds
}

// cpuOf is a process' processor time in seconds: fields 14 and 15 of /proc/PID/stat, in ticks of 10 ms (proc(5)).
func cpuOf(pid int) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0 // it has ended, which is told elsewhere
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	user, _ := strconv.ParseFloat(fields[11], 64)
	system, _ := strconv.ParseFloat(fields[12], 64)
	return (user + system) / 100
}

// counters are NATS' own.
type counters struct {
	InMsgs   float64 `json:"in_msgs"`
	InBytes  float64 `json:"in_bytes"`
	OutMsgs  float64 `json:"out_msgs"`
	OutBytes float64 `json:"out_bytes"`
}

func (c counters) minus(d counters, times float64) counters {
	return counters{c.InMsgs - times*d.InMsgs, c.InBytes - times*d.InBytes, c.OutMsgs - times*d.OutMsgs, c.OutBytes - times*d.OutBytes}
}

func (c counters) of(name string, requests float64) Traffic {
	return Traffic{name, c.InMsgs / requests, c.InBytes / requests, c.OutMsgs / requests, c.OutBytes / requests}
}

// settled is the time after which requests that have ended send nothing any more.
const settled = 300 * time.Millisecond

// traffic is what NATS counts while do runs, or for a time.
func (s *system) traffic(idle time.Duration, do func() error) (counters, error) {
	time.Sleep(settled)
	before, err := s.counters()
	if err != nil {
		return counters{}, err
	}
	if do != nil {
		if err := do(); err != nil {
			return counters{}, err
		}
	}
	time.Sleep(max(idle, settled))
	after, err := s.counters()
	return after.minus(before, 1), err
}

func (s *system) counters() (c counters, err error) {
	resp, err := http.Get(s.monitor + "/varz")
	if err != nil {
		return c, fmt.Errorf("asking NATS for its counters: %w", err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err == nil {
		err = json.Unmarshal(data, &c)
	}
	if err != nil {
		return c, fmt.Errorf("reading NATS' counters: %w", err)
	}
	return c, nil
}

func (r *ControlReport) writeTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "HOP\tSAMPLES\tP50 ms\tP99 ms")
	for _, h := range r.Hops {
		fmt.Fprintf(t, "%s\t%d\t%.3f\t%.3f\n", h.Name, h.Samples, h.P50, h.P99)
	}
	fmt.Fprintln(t, "\nA REQUEST ON NATS\tMESSAGES\tBYTES\tDELIVERED\tBYTES")
	for _, x := range r.Traffic {
		fmt.Fprintf(t, "%s\t%.1f\t%.0f\t%.1f\t%.0f\n", x.Request, x.Messages, x.Bytes, x.Out, x.OutBytes)
	}
	l := r.Load
	fmt.Fprintf(t, "\n%d STREAMS, A TOKEN EACH %.0f ms\tTOKENS/S\tDELAY P50 ms\tP99\tMAX\n", r.Streams, r.Step)
	steps := "spread"
	if r.Together {
		steps = "together"
	}
	fmt.Fprintf(t, "%d tokens in %.1f s, %d decoders, steps %s\t%.0f\t%.2f\t%.2f\t%.2f\n", l.Tokens, l.Seconds, r.Decoders, steps, l.Rate, l.P50, l.P99, l.Max)
	fmt.Fprintln(t, "\nPROCESSOR TIME OF THE LOAD\tCORES\tUS A TOKEN")
	var cores, token float64
	for _, c := range l.CPU {
		fmt.Fprintf(t, "%s\t%.2f\t%.1f\n", c.Name, c.Cores, c.Token)
		cores, token = cores+c.Cores, token+c.Token
	}
	fmt.Fprintf(t, "all, of %d\t%.2f\t%.1f\n", r.CPUs, cores, token)
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "stages are %s; the delay of a token is from there to its event at the client\n", r.Stages)
	return err
}
