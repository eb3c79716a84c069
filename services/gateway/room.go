package gateway

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	"trireme.dev/services/gateway/admission"
	"trireme.dev/services/gateway/openai"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

// rooms is how much one request can have at most, in bytes: what the smallest NPU of a role has beside weights, as any
// of them may get the request. What only a cache keeps is free. 0: not known.
type rooms struct {
	encode, prefill, decode int64
}

// capacities says how much one request and all of them can have of NPUs; instances gives those that have a role. KV lies on
// the decoders' NPUs for most of its life, and MM objects lie with the encoders and then with prefill, so that the lesser of
// the two counts. For a role that no instance is known of, all NPUs count. NPUs of instances with several roles have
// several of these at once (RATIONALE.md): what there is for both together bounds both together.
func capacities(npus []NPUCapacity, instances func(role string) map[string]bool) (rooms, admission.Capacity) {
	encoders, prefills, decoders := instances("encode"), instances("prefill"), instances("decode")
	of := func(has ...map[string]bool) (sum, smallest int64) { // of NPUs that have any of these
		var all, least int64
		for _, n := range npus {
			all, least = all+n.Bytes, smaller(least, n.Bytes)
			if slices.ContainsFunc(has, func(h map[string]bool) bool { return h[n.Instance] }) {
				sum, smallest = sum+n.Bytes, smaller(smallest, n.Bytes)
			}
		}
		if sum == 0 {
			return all, least
		}
		return sum, smallest
	}
	shared := func(a, b map[string]bool) bool {
		return slices.ContainsFunc(npus, func(n NPUCapacity) bool { return a[n.Instance] && b[n.Instance] })
	}
	var r rooms
	var c admission.Capacity
	var encode, prefill int64
	encode, r.encode = of(encoders)
	prefill, r.prefill = of(prefills)
	c.KV, r.decode = of(decoders)
	c.MM = min(encode, prefill)
	if shared(encoders, decoders) || shared(prefills, decoders) {
		first, _ := of(encoders, decoders)
		then, _ := of(prefills, decoders)
		c.Both = min(first, then)
	}
	if shared(encoders, prefills) {
		c.Prompt, _ = of(encoders, prefills)
	}
	return r, c
}

// smaller is the smaller of two sizes; a is 0 before the first.
func smaller(a, b int64) int64 {
	if a == 0 {
		return b
	}
	return min(a, b)
}

// bound sees to it that the job fits one NPU of each stage, whatever else there is: an answer whose length the client
// leaves open is bounded by what fits, and any other request that cannot fit is refused with an *openai.Error.
func (g *Gateway) bound(j *job, p *openai.Params) error {
	r := g.rooms.Load()
	if r == nil { // the HMM could not be asked; its memory is not counted either
		return nil
	}
	if mm := g.mm(j); mm > min(r.encode, r.prefill) {
		return openai.TooLong("messages", "The %s of this request need %v of NPU memory, and each NPU that encodes or takes pictures "+
			"has %v for them: send fewer or smaller ones, or start the server with a larger --npu-memory.",
			count(len(j.pictures), "picture"), conf.Bytes(mm), conf.Bytes(min(r.encode, r.prefill)))
	}
	most := &j.spec.Sampling.MaxTokens
	fits := func(tokens int) bool {
		asked := *most
		defer func() { *most = asked }()
		*most = tokens // it sizes the logs
		return g.kv(j, tokens) <= r.decode && g.kv(j, tokens)+g.mm(j) <= r.prefill
	}
	if fits(*most) {
		return nil
	}
	if p.MaxTokens == nil {
		least := max(1, p.MinTokens)
		if n := sort.Search(*most, func(n int) bool { return !fits(n + 1) }); n >= least {
			*most = n
			j.expected = min(j.expected, n)
			return nil
		}
	}
	return openai.TooLong("max_tokens", "A prompt of %d tokens with %d choices of up to %d tokens needs %v of NPU memory, and each "+
		"NPU of this server has %v for it: ask for fewer tokens, or start the server with a larger --npu-memory.",
		len(j.spec.Prompt), j.spec.Choices, *most, conf.Bytes(g.kv(j, *most)+g.mm(j)), conf.Bytes(min(r.decode, r.prefill)))
}

// overloaded is the 429 of a request that admission refused: what bounds it, and of memory only what is too little.
func overloaded(r *admission.Refusal, o *objective) *openai.Error {
	var needs []string
	for _, k := range []struct {
		what                 string
		need, used, capacity int64
	}{
		{"KV", r.Need.KV, r.Used.KV, r.Capacity.KV},
		{"pictures", r.Need.MM, r.Used.MM, r.Capacity.MM},
		{"both together", r.Need.KV + r.Need.MM, r.Used.KV + r.Used.MM, r.Capacity.Both},
	} {
		if k.need > 0 && k.capacity > 0 && k.need+k.used > k.capacity {
			needs = append(needs, fmt.Sprintf("%v for %s (%v of %v are taken)",
				conf.Bytes(k.need), k.what, conf.Bytes(k.used), conf.Bytes(k.capacity)))
		}
	}
	why := fmt.Sprintf("%s in work, %d waiting", count(r.Open, "request"), r.Waiting)
	switch r.Reason {
	case admission.QueueFull:
		why += ", which is as many as may (--max-queue)"
	case admission.Waited:
		why += "; this one has waited for as long as it may (--queue-wait)"
	}
	if len(needs) > 0 {
		why += "; this one needs " + strings.Join(needs, " and ")
	}
	if r.Reason == admission.Late {
		why += fmt.Sprintf("; it would come too late for the targets of this one (%v)", o.targets)
	}
	return openai.Overloaded(r.RetryAfter, "%s", why)
}

// yield ends an attempt that found no room for its KV and begins the next when there is room for all of it. The answer
// stands still meanwhile. It is no failure: only the deadline bounds how often it happens, and each time an older
// request gets on.
func (l *life) yield(ctx context.Context, why string) error {
	l.g.log.Info("a request waits for room", "request", l.id, "attempt", l.answer.Attempt(), "why", why)
	l.g.metrics.yields.Inc()
	l.yielded++
	l.next()
	// The memory first: those who have the room may need it before they end.
	hold := Hold{Request: l.id, Attempt: l.answer.Attempt(), Left: time.Until(l.deadline)}
	if err := l.memory.Supersede(ctx, hold); err != nil && !errors.Is(err, mem.ErrLost) { // a lost HMM holds nothing
		return fmt.Errorf("letting go of an attempt's memory: %w", err)
	}
	l.job.expected = l.job.spec.Sampling.MaxTokens
	if err := l.credit.Exchange(ctx, l.g.need(l.job)); err != nil {
		return err
	}
	return l.start(ctx)
}

// countNPUs is how many NPUs instances have, each counted once, whatever the group in which it is.
func countNPUs(groups ...[]wire.Instance) (n int) {
	counted := map[string]bool{}
	for _, i := range slices.Concat(groups...) {
		if !counted[i.ID] {
			counted[i.ID] = true
			n += len(i.NPUs)
		}
	}
	return n
}
