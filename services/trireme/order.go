package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"

	"trireme.dev/services/gateway"
	"trireme.dev/shared/sched"
)

// policyFlag is the same for gateways and prefill instances.
type policyFlag struct {
	Policy string `help:"Which of the requests of one priority and tenant goes first: fcfs (who came first), sjf (who has the least work) or slo (who has to start first to meet its targets; without targets as fcfs). By default slo." enum:",fcfs,sjf,slo" default:"" placeholder:"POLICY"`
}

// policy is what the flag says.
func (f *policyFlag) policy() (sched.Policy, error) {
	if f.Policy == "" {
		return sched.SLO, nil
	}
	return sched.ParsePolicy(f.Policy)
}

// args is the flag if it was given.
func (f *policyFlag) args() []string {
	if f.Policy == "" {
		return nil
	}
	return []string{"--policy", f.Policy}
}

// orderFlags say in which order requests that wait for capacity are let in.
type orderFlags struct {
	policyFlag
	SLO          string             `name:"slo" help:"Targets of requests that state none: time to the first token, waiting included, and between tokens, as in ttft:2s,tpot:100ms. None by default." placeholder:"TARGETS"`
	Late         string             `help:"What becomes of a request that waits and can no longer meet its targets, under --policy slo: refuse (429) or last (after all others). By default last." enum:",refuse,last" default:"" placeholder:"WHAT"`
	Class        map[string]string  `help:"Requests that clients send under this service_tier or objective, as in batch=priority:20,ttft:none or gold=priority:-5,ttft:500ms; lower priorities go first; may be repeated. There are default, priority (-10) and flex (10, no targets)." placeholder:"NAME=CLASS"`
	TenantWeight map[string]float64 `help:"Share of a tenant, as in gold=4; others have 1; may be repeated." placeholder:"NAME=WEIGHT"`
}

// apply puts the flags into a gateway's configuration.
func (f *orderFlags) apply(c *gateway.Config) (err error) {
	c.Policy, c.Late, c.TenantWeights = f.Policy, f.Late, f.TenantWeight
	if c.Targets, err = gateway.ParseTargets(f.SLO); err != nil {
		return fmt.Errorf("%w--slo: %w", errUsage, err)
	}
	c.Classes = map[string]gateway.Class{}
	for name, text := range f.Class {
		if c.Classes[name], err = gateway.ParseClass(text); err != nil {
			return fmt.Errorf("%w--class %s: %w", errUsage, name, err)
		}
	}
	for name, w := range f.TenantWeight {
		if !(w > 0) {
			return fmt.Errorf("%w--tenant-weight %s=%v: a weight is above 0", errUsage, name, w)
		}
	}
	return nil
}

// args are the flags that were given, for a gateway's command line.
func (f *orderFlags) args() []string {
	args := f.policyFlag.args()
	for _, x := range [][2]string{{"--slo", f.SLO}, {"--late", f.Late}} {
		if x[1] != "" {
			args = append(args, x[0], x[1])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(f.Class)) {
		args = append(args, "--class", name+"="+f.Class[name])
	}
	for _, name := range slices.Sorted(maps.Keys(f.TenantWeight)) {
		args = append(args, "--tenant-weight", name+"="+strconv.FormatFloat(f.TenantWeight[name], 'g', -1, 64))
	}
	return args
}
