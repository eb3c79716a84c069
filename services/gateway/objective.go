package gateway

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"trireme.dev/services/gateway/admission"
	"trireme.dev/services/gateway/openai"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/wire"
)

// ErrClass is wrapped by errors of ParseTargets and ParseClass.
var ErrClass = errors.New("invalid class of requests")

// NoTarget is a target of a Class that has none whatever the default.
const NoTarget = time.Duration(-1)

// Class is what requests ask for by name: with service_tier, as at OpenAI, or with an objective, as with llm-d.
type Class struct {
	Priority int           // lower ones go first
	TTFT     time.Duration // target; 0: the default, NoTarget: none
	TPOT     time.Duration // likewise
}

// The classes that there are without being configured, named as OpenAI's service tiers.
const (
	classDefault  = "default"
	classPriority = "priority"
	classFlex     = "flex"
)

// withClasses adds the classes that are always there to those configured.
func withClasses(configured map[string]Class) map[string]Class {
	all := map[string]Class{
		classDefault: {}, classPriority: {Priority: -10}, classFlex: {Priority: 10, TTFT: NoTarget, TPOT: NoTarget},
	}
	maps.Copy(all, configured)
	return all
}

// ParseTargets reads targets like "ttft:2s,tpot:100ms"; "" has none.
func ParseTargets(text string) (sched.Targets, error) {
	if text == "" {
		return sched.Targets{}, nil
	}
	c, err := ParseClass(text)
	if err == nil && c.Priority != 0 {
		err = fmt.Errorf("%w %q: targets have no priority", ErrClass, text)
	}
	return sched.Targets{TTFT: max(0, c.TTFT), TPOT: max(0, c.TPOT)}, err
}

// ParseClass reads a class like "priority:-5,ttft:500ms,tpot:none".
func ParseClass(text string) (Class, error) {
	var c Class
	for part := range strings.SplitSeq(text, ",") {
		name, value, _ := strings.Cut(part, ":")
		var err error
		switch name {
		case "priority":
			c.Priority, err = strconv.Atoi(value)
		case "ttft":
			c.TTFT, err = parseTarget(value)
		case "tpot":
			c.TPOT, err = parseTarget(value)
		default:
			err = fmt.Errorf("%q is none of priority, ttft and tpot", name)
		}
		if err != nil {
			return Class{}, fmt.Errorf("%w %q, which should be like priority:-5,ttft:500ms,tpot:50ms: %w", ErrClass, text, err)
		}
	}
	return c, nil
}

func parseTarget(value string) (time.Duration, error) {
	if value == "none" {
		return NoTarget, nil
	}
	d, err := time.ParseDuration(value)
	if err == nil && d <= 0 {
		err = fmt.Errorf("a target of %v can never be met", d)
	}
	return d, err
}

// objective is what a request's place in line depends on, beside its size.
type objective struct {
	tenant   string
	weight   float64 // of the tenant; 0 is 1
	class    string
	priority int
	targets  sched.Targets
}

// The headers, each with the names that llm-d and the Gateway API Inference Extension have for it.
var (
	headersTenant = []string{"x-gateway-inference-fairness-id", "x-llm-d-inference-fairness-id"}
	headersClass  = []string{"x-gateway-inference-objective", "x-llm-d-inference-objective"}
	headersTTFT   = []string{"x-slo-ttft-ms", "x-llm-d-slo-ttft-ms"}
	headersTPOT   = []string{"x-slo-tpot-ms", "x-llm-d-slo-tpot-ms"}
)

// maxTenant bounds the name of a tenant, in bytes.
const maxTenant = 128

// objective reads what a request says about its place in line. Headers come before the body, as they are what a proxy in
// front can set. Its error is an *openai.Error.
func (g *Gateway) objective(h http.Header, p *openai.Params) (objective, error) {
	header := func(names []string) (name, value string) {
		for _, n := range names {
			if v := h.Get(n); v != "" {
				return n, v
			}
		}
		return names[0], ""
	}
	o := objective{class: classDefault, tenant: p.User}
	param, name := header(headersClass)
	if name == "" {
		param, name = "service_tier", p.Tier
	}
	switch name {
	case "", "auto":
	case "scale": // OpenAI's tier of paid-for throughput
		o.class = classPriority
	default:
		o.class = name
	}
	class, ok := g.cfg.Classes[o.class]
	if !ok {
		return o, openai.Invalid(param, "There is no class of requests called %q here; there are %s.", name,
			strings.Join(slices.Sorted(maps.Keys(g.cfg.Classes)), ", "))
	}
	o.priority = class.Priority
	if p.Priority != nil {
		o.priority = *p.Priority
	}
	o.targets = g.cfg.Targets
	for _, t := range []struct {
		to      *time.Duration
		class   time.Duration
		headers []string
	}{{&o.targets.TTFT, class.TTFT, headersTTFT}, {&o.targets.TPOT, class.TPOT, headersTPOT}} {
		if t.class != 0 {
			*t.to = max(0, t.class)
		}
		param, value := header(t.headers)
		if value == "" {
			continue
		}
		ms, err := strconv.ParseFloat(value, 64)
		if err != nil || !(ms > 0 && ms < 1e9) {
			return o, openai.Invalid(param, "%s: %q is no number of milliseconds above 0.", param, value)
		}
		*t.to = time.Duration(ms * float64(time.Millisecond))
	}
	if _, tenant := header(headersTenant); tenant != "" {
		o.tenant = tenant
	}
	if len(o.tenant) > maxTenant {
		return o, openai.Invalid("user", "The name of a tenant has at most %d bytes.", maxTenant)
	}
	o.weight = g.cfg.TenantWeights[o.tenant]
	return o, nil
}

// request is what admission is asked for jobs with an objective, that came at began.
func (g *Gateway) request(jobs []*job, o objective, began time.Time) admission.Request {
	r := admission.Request{N: len(jobs), Class: o.class, Tenant: o.tenant, Weight: o.weight, Priority: o.priority, Arrived: began}
	due := sched.Never
	for _, j := range jobs {
		r.Bytes = r.Bytes.Plus(g.need(j))
		r.Tokens += j.tokens()
		b := o.targets.Split(g.paces.service(j))
		if b.Hopeless { // late whenever it starts
			b.Start = 0
		}
		due = min(due, b.Start)
	}
	if due != sched.Never {
		r.Due = began.Add(due)
	}
	return r
}

// place is what a stage has to know to put a request in order among others.
func (o *objective) place(began time.Time) wire.Place {
	p := wire.Place{Tenant: o.tenant, Weight: o.weight, Priority: o.priority, Waited: time.Since(began)}
	if o.targets.TTFT > 0 {
		p.Target, p.Left = true, o.targets.TTFT-p.Waited
	}
	return p
}

// tokens is a job's work, as far as it is known before it starts.
func (j *job) tokens() int64 { return int64(len(j.spec.Prompt) + j.expected*j.spec.Choices) }

// pictureTokens is how many of the prompt's tokens are pictures.
func (j *job) pictureTokens() int {
	n := 0
	for _, p := range j.pictures {
		n += p.tokens
	}
	return n
}

// paces is how long the stages take lately. It is safe for concurrent use.
type paces struct {
	mu      sync.Mutex
	prefill sched.Line // by prompt tokens, from being let in to the first token
	encode  sched.Line // by picture tokens, what pictures take beyond that
	token   float64    // seconds for each token after the first, smoothed; 0: not measured
}

// service is what a job's stages are expected to take.
func (p *paces) service(j *job) sched.Service {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := sched.Service{Prefill: p.prefill.At(len(j.spec.Prompt)), Token: time.Duration(p.token * float64(time.Second))}
	if len(j.pictures) > 0 {
		s.Encode = p.encode.At(j.pictureTokens())
	}
	return s
}

// first takes note of how long a job took to its first token after it was let in.
func (p *paces) first(j *job, took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	prompt := len(j.spec.Prompt)
	if len(j.pictures) == 0 {
		p.prefill.Add(prompt, took)
		return
	}
	p.encode.Add(j.pictureTokens(), max(0, took-p.prefill.At(prompt)))
}

// tokens takes note of the time between two tokens of an answer.
func (p *paces) tokens(each time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.token == 0 {
		p.token = each.Seconds()
	}
	p.token += (each.Seconds() - p.token) / 8
}

// attained counts whether an answer that has ended well has met its targets. The time in the queue counts.
func (m *metrics) attained(o *objective, ttft, tpot time.Duration) {
	for _, t := range []struct {
		name         string
		target, took time.Duration
	}{{"ttft", o.targets.TTFT, ttft}, {"tpot", o.targets.TPOT, tpot}} {
		if t.target > 0 {
			m.slo.WithLabelValues(o.class, t.name, strconv.FormatBool(t.took <= t.target)).Inc()
		}
	}
}

// checkOrder reports the faults of what a configuration says about the order of requests.
func (c *Config) checkOrder() error {
	var errs []error
	if c.Policy != "" {
		if _, err := sched.ParsePolicy(c.Policy); err != nil {
			errs = append(errs, err)
		}
	}
	if c.Late != "" && c.Late != LateRefuse && c.Late != LateLast {
		errs = append(errs, fmt.Errorf("what is late is refused or goes last, not %q", c.Late))
	}
	for tenant, w := range c.TenantWeights {
		if !(w > 0) || math.IsInf(w, 0) {
			errs = append(errs, fmt.Errorf("the weight of tenant %q is %v; it must be above 0", tenant, w))
		}
	}
	return errors.Join(errs...)
}
