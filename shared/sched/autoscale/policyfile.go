package autoscale

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"gopkg.in/yaml.v3"
)

// Parse reads a policy file (scaler.yaml): what it leaves out is as in Default, so an empty file is Default. A key that there is not
// is an error that names it, its line, and those that there are. All errors wrap ErrPolicy.
func Parse(data []byte) (Policy, error) {
	p := Default()
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		return Policy{}, fmt.Errorf("%w: %w", ErrPolicy, err)
	}
	if len(doc.Content) > 0 {
		if err := read(doc.Content[0], "", keysOf(&p)); err != nil {
			return Policy{}, fmt.Errorf("%w: %w", ErrPolicy, err)
		}
	}
	if err := p.Check(); err != nil {
		return Policy{}, err
	}
	return p, nil
}

// keys are what may stand in a mapping, each with what reads its value: keys, or a func(string) error, or func(*yaml.Node) error.
type keys map[string]any

func keysOf(p *Policy) keys {
	stages, costs := keys{}, keys{}
	for s := range Stages {
		b := &p.Bounds[s]
		stages[Stage(s).String()] = keys{"min": whole(&b.Min), "max": whole(&b.Max), "utilisation": number(&p.Utilisation[s])}
	}
	for _, a := range Actions {
		costs[string(a)] = keys{
			"time": func(text string) error {
				cost := p.Costs[a]
				err := duration(&cost.Time)(text)
				p.Costs[a] = cost
				return err
			},
			"bytes": func(text string) error {
				cost := p.Costs[a]
				var n float64
				err := number(&n)(text)
				cost.Bytes = int64(n)
				p.Costs[a] = cost
				return err
			},
		}
	}
	direction := func(d *Direction) keys { return keys{"window": duration(&d.Window), "cooldown": duration(&d.Cooldown)} }
	return keys{
		"mode":    func(text string) error { p.Mode = Mode(text); return nil },
		"targets": keys{"ttft": duration(&p.Targets.TTFT), "tpot": duration(&p.Targets.TPOT), "percentile": number(&p.Targets.Percentile)},
		"budget":  whole(&p.Budget),
		"stages":  stages,
		"actions": func(n *yaml.Node) error {
			p.Actions = nil
			if n.Kind != yaml.SequenceNode {
				return errors.New("a list is wanted, as [widen, narrow]")
			}
			for _, a := range n.Content {
				p.Actions = append(p.Actions, Action(a.Value))
			}
			return nil
		},
		"band":    number(&p.Band),
		"drain":   duration(&p.Drain),
		"grow":    direction(&p.Grow),
		"shrink":  direction(&p.Shrink),
		"stale":   duration(&p.Stale),
		"retry":   duration(&p.Retry),
		"weights": keys{"npu": number(&p.Weights.NPU), "late": number(&p.Weights.Late), "change": number(&p.Weights.Change)},
		"costs":   costs,
	}
}

func whole(to *int) func(string) error {
	return func(text string) error {
		n, err := strconv.Atoi(text)
		if err != nil {
			return fmt.Errorf("%q is no whole number", text)
		}
		*to = n
		return nil
	}
}

func number(to *float64) func(string) error {
	return func(text string) error {
		n, err := strconv.ParseFloat(text, 64)
		if err != nil || math.IsNaN(n) || math.IsInf(n, 0) {
			return fmt.Errorf("%q is no number", text)
		}
		*to = n
		return nil
	}
}

func duration(to *time.Duration) func(string) error {
	return func(text string) error {
		d, err := time.ParseDuration(text)
		if err != nil {
			return fmt.Errorf("%q is no duration; write 500ms, 10s or 2m", text)
		}
		*to = d
		return nil
	}
}

// read reads a mapping.
func read(n *yaml.Node, path string, known keys) error {
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return nil // a key with nothing under it
	}
	if n.Kind != yaml.MappingNode {
		return fmt.Errorf("line %d: %sa mapping is wanted, with %s", n.Line, within(path), list(known))
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		at := strings.TrimPrefix(path+"."+key.Value, ".")
		if seen[key.Value] {
			return fmt.Errorf("line %d: %s is there twice", key.Line, at)
		}
		seen[key.Value] = true
		var err error
		switch reader := known[key.Value].(type) {
		case nil:
			return fmt.Errorf("line %d: there is no key %s; there are %s", key.Line, at, list(known))
		case keys:
			if err := read(value, at, reader); err != nil {
				return err
			}
			continue
		case func(*yaml.Node) error:
			err = reader(value)
		case func(string) error:
			if value.Kind != yaml.ScalarNode {
				err = errors.New("one value is wanted")
			} else {
				err = reader(value.Value)
			}
		}
		if err != nil {
			return fmt.Errorf("line %d: %s: %w", value.Line, at, err)
		}
	}
	return nil
}

func within(path string) string {
	if path == "" {
		return ""
	}
	return path + ": "
}

func list(known keys) string { return strings.Join(slices.Sorted(maps.Keys(known)), ", ") }

// Check says what is wrong with a policy, and what to do. Its errors wrap ErrPolicy.
func (p *Policy) Check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrPolicy, fmt.Sprintf(format, args...))
	}
	if !slices.Contains([]Mode{Off, Advise, Auto}, p.Mode) {
		return bad("mode: there is no %q; there are off, advise and auto", p.Mode)
	}
	if p.Targets.TTFT <= 0 || p.Targets.TPOT <= 0 {
		return bad("targets: ttft %v and tpot %v must be above 0; give what clients should feel", p.Targets.TTFT, p.Targets.TPOT)
	}
	if p.Targets.Percentile <= 0 || p.Targets.Percentile >= 100 {
		return bad("targets.percentile: %g is not above 0 and below 100; 90 is nine requests of ten", p.Targets.Percentile)
	}
	if p.Budget < 0 {
		return bad("budget: %d is below 0; 0 is as many NPUs as there are", p.Budget)
	}
	for k, b := range p.Bounds {
		s := Stage(k)
		switch {
		case b.Min < 0 || b.Max < 0:
			return bad("stages.%s: bounds are not below 0; max 0 is no bound", s)
		case b.Max > 0 && b.Max < max(1, b.Min):
			return bad("stages.%s: max %d is below min %d; lower min or raise max", s, b.Max, b.Min)
		case p.Budget > 0 && b.Min > p.Budget:
			return bad("stages.%s: min %d is more than the budget of %d; lower min or raise budget", s, b.Min, p.Budget)
		case p.Utilisation[s] <= 0 || p.Utilisation[s] > 1:
			return bad("stages.%s.utilisation: %g is not above 0 and at most 1; 0.8 leaves room for arrivals by chance", s, p.Utilisation[s])
		}
	}
	for i, a := range p.Actions {
		if !slices.Contains(Actions, a) {
			return bad("actions: there is no %q; there are %s", a, strings.Join(names(Actions), ", "))
		}
		if slices.Contains(p.Actions[:i], a) {
			return bad("actions: %s is there twice", a)
		}
	}
	if p.Band <= 0 || p.Band > 1 {
		return bad("band: %g is not above 0 and at most 1; without one, chance alone makes changes; 0.15 is usual", p.Band)
	}
	if p.Shrink.Window < p.Grow.Window {
		return bad("shrink.window %v is below grow.window %v; what is taken away must have been idle for longer than what is given has been wanted", p.Shrink.Window, p.Grow.Window)
	}
	for _, d := range []struct {
		key         string
		d           time.Duration
		least, most time.Duration
	}{
		{"drain", p.Drain, 100 * time.Millisecond, time.Hour}, {"stale", p.Stale, time.Second, time.Minute}, {"retry", p.Retry, 0, 24 * time.Hour},
		{"grow.window", p.Grow.Window, 0, time.Hour}, {"grow.cooldown", p.Grow.Cooldown, 0, time.Hour},
		{"shrink.window", p.Shrink.Window, 0, 24 * time.Hour}, {"shrink.cooldown", p.Shrink.Cooldown, 0, 24 * time.Hour},
	} {
		if d.d < d.least || d.d > d.most {
			return bad("%s: %v is not %v to %v", d.key, d.d, d.least, d.most)
		}
	}
	if w := p.Weights; w.NPU < 0 || w.Late <= w.NPU || w.Change < 0 {
		return bad("weights: none is below 0, and late %g must be above npu %g, or nothing would ever be worth an NPU", w.Late, w.NPU)
	}
	for a, c := range p.Costs {
		if c.Time < 0 || c.Bytes < 0 {
			return bad("costs.%s: time and bytes are not below 0", a)
		}
	}
	return nil
}

func names(actions []Action) []string {
	var all []string
	for _, a := range actions {
		all = append(all, string(a))
	}
	return all
}

// Describe says for people what a policy means.
func (p *Policy) Describe() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	switch p.Mode {
	case Off:
		line("Nothing is decided (mode off).")
	case Advise:
		line("Decisions are told and not carried out (mode advise).")
	case Auto:
		line("Decisions are told and carried out (mode auto).")
	}
	line("%g%% of requests should have their first token within %v and the others every %v.", p.Targets.Percentile, p.Targets.TTFT, p.Targets.TPOT)
	if p.Budget > 0 {
		line("Instances have at most %s together.", count(p.Budget, "NPU"))
	} else {
		line("Instances may have all NPUs there are.")
	}
	for k, bound := range p.Bounds {
		many := fmt.Sprintf("%d or more", bound.Min)
		if bound.Max > 0 {
			many = fmt.Sprintf("%d to %d", bound.Min, bound.Max)
		}
		line("%-8s %s NPUs, sized to compute %.0f%% of the time (more where many encode or prefill)", Stage(k).String()+":", many, 100*p.Utilisation[k])
	}
	line("A stage gets more when it has needed %.0f%% more than it has for %v, %v after the last change; what waits should be gone in %v.",
		100*p.Band, p.Grow.Window, p.Grow.Cooldown, p.Drain)
	line("NPUs become spare when no stage has needed them for %v, %v after the last change.", p.Shrink.Window, p.Shrink.Cooldown)
	if len(p.Actions) > 0 {
		line("Allowed: %s.", strings.Join(names(p.Actions), ", "))
	} else {
		line("No action is allowed: nothing will ever be changed.")
	}
	line("Signals count for %v. What failed is tried again after %v.", p.Stale, p.Retry)
	line("An NPU that is wanting is worth %.3g NPUs in use, a second that a change takes %.3g.", p.Weights.Late/max(1e-9, p.Weights.NPU), p.Weights.Change/max(1e-9, p.Weights.NPU))
	return b.String()
}
