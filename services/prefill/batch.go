package prefill

import (
	"context"
	"fmt"
	"time"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/runner"
	"trireme.dev/shared/wire"
)

// add takes a job into the loop.
func (p *prefill) add(j *job) {
	p.jobs[j] = true
	j.left = len(j.choices)
	if err := p.line(j, 0, j.cached); err != nil {
		p.drop(j, err)
	}
}

// line adds the lane of choice c, of which pos tokens are computed, and takes the blocks for all of it.
func (p *prefill) line(j *job, c, pos int) error {
	tokens := append(append([]int32{}, j.spec.Prompt...), j.resume(c)...)
	if err := j.choices[c].seq.Grow(len(tokens)); err != nil {
		return err
	}
	l := &lane{job: j, choice: c, pos: pos, tokens: tokens}
	p.lanes = append(p.lanes, l)
	p.wait(l)
	return nil
}

// wait puts a lane in line with what is left of it.
func (p *prefill) wait(l *lane) {
	left, place := len(l.tokens)-l.pos, &l.job.place
	l.item = sched.Item{
		Owner: l, Tenant: place.Tenant, Weight: place.Weight, Priority: place.Priority,
		Tokens: int64(left), Arrived: -place.Waited, Due: sched.Never, Begun: len(l.job.resume(l.choice)) > 0,
	}
	if place.Target {
		l.item.Due = place.Left - p.pace.at(left)
	}
	p.queue.Push(&l.item)
}

// drop takes a job out of the loop and ends it with err.
func (p *prefill) drop(j *job, err error) {
	if !p.jobs[j] {
		return
	}
	delete(p.jobs, j)
	keep := p.lanes[:0]
	for _, l := range p.lanes {
		if l.job != j {
			keep = append(keep, l)
		} else {
			p.queue.Remove(&l.item)
		}
	}
	clear(p.lanes[len(keep):])
	p.lanes = keep
	j.done <- err
}

// Form implements runner.Source: the lanes in the order of the queue, each with as many rows as fit. A chunk ends with the
// prompt, so that its logits are there for every choice. Lanes that are late already go last, so that others need not be.
func (p *prefill) Form(step *runner.Step) {
	p.prune()
	p.taken = p.taken[:0]
	p.formed = time.Now()
	for _, it := range p.queue.Overdue(p.formed.Sub(p.epoch)) {
		p.queue.Demote(it)
	}
	full := placement.Set(0) // NPUs without room in the step
	for it := p.queue.Next(); it != nil; it = p.queue.Next() {
		l := it.Owner.(*lane)
		if !p.Turn(l.job.claim) {
			p.queue.Remove(it)
			p.put = append(p.put, l)
			continue
		}
		left := len(l.tokens) - l.pos
		prompt := len(l.job.spec.Prompt)
		if l.pos < prompt {
			left = prompt - l.pos
		}
		npu := l.job.seat.NPU
		n := step.Chunk(npu, l.pos, left)
		if n == 0 {
			l.job.claim.Rest()
			if full = full.With(npu); full == step.NPUs() {
				break
			}
			p.queue.Remove(it)
			p.put = append(p.put, l)
			continue
		}
		p.queue.TakePart(int64(n))
		end := l.pos + n
		step.Add(engine.Seq{
			NPU:    npu,
			Tokens: l.tokens[l.pos:end],
			Pos:    l.pos,
			Rope:   l.rope(n),
			Delta:  l.job.delta,
			Blocks: l.job.choices[l.choice].seq.Blocks,
			Visual: l.visual(end),
			Want:   end == prompt || end == len(l.tokens),
		})
		p.taken = append(p.taken, l)
	}
	for _, l := range p.put {
		p.queue.Push(&l.item)
	}
	clear(p.put)
	p.put = p.put[:0]
}

// prune drops the jobs that are to end, and those whose claim another one has.
func (p *prefill) prune() {
	for j := range p.jobs {
		if j.ctx.Err() != nil { // the handler is about to say so
			p.drop(j, context.Cause(j.ctx))
		} else if !j.claim.Held() {
			p.drop(j, mem.ErrFenced)
		}
	}
}

// rope is the M-RoPE positions of the next n tokens, nil behind the prompt, where they follow from the delta.
func (l *lane) rope(n int) [][3]int32 {
	if l.pos >= len(l.job.spec.Prompt) {
		return nil
	}
	return l.job.rope[l.pos : l.pos+n]
}

// visual is the multimodal tokens among tokens [l.pos, end).
func (l *lane) visual(end int) []engine.Visual {
	var v []engine.Visual
	for _, pic := range l.job.visual {
		from, to := max(l.pos, pic.first), min(end, pic.first+pic.tokens)
		if from >= to {
			continue
		}
		part := engine.Visual{Row: from - l.pos, Rows: to - from}
		for _, plane := range pic.planes {
			hidden := len(plane) / pic.tokens
			part.Planes = append(part.Planes, plane[(from-pic.first)*hidden:(to-pic.first)*hidden])
		}
		v = append(v, part)
	}
	return v
}

// Computed implements runner.Source: it seals full blocks, samples where a prompt or a resumed answer is complete, and sends
// the first tokens to their gateways.
func (p *prefill) Computed(batch []engine.Seq, logits [][]float32, err error) {
	if err != nil {
		for _, l := range p.taken {
			p.drop(l.job, fmt.Errorf("computing a prompt: %w", err))
		}
		return
	}
	tokens := 0
	runs := map[string][]wire.Run{}
	for i, l := range p.taken {
		n := len(batch[i].Tokens)
		tokens += n
		j := l.job
		if !p.jobs[j] {
			continue
		}
		j.choices[l.choice].seq.Seal(l.pos, l.pos+n)
		l.pos += n
		j.rows += n
		p.owe(j, max(0, j.owes-n))
		p.Reached(j.claim, j.cached+j.rows)
		j.claim.Rest()
		var err error
		if l.choice == 0 && l.pos == len(j.spec.Prompt) {
			err = p.promptDone(j, logits[i], runs)
		} else if l.pos == len(l.tokens) {
			err = p.first(j, l.choice, logits[i], runs)
		}
		if err != nil {
			p.drop(j, err)
		}
	}
	p.rows.Add(float64(tokens))
	p.pace.add(tokens, time.Since(p.formed))
	for _, l := range p.taken {
		if p.jobs[l.job] && l.pos < len(l.tokens) {
			p.wait(l)
		}
	}
	p.send(runs)
	p.sweep()
}

// promptDone forks the other choices behind the computed prompt; those with nothing to resume get their first token
// from its logits.
func (p *prefill) promptDone(j *job, logits []float32, runs map[string][]wire.Run) error {
	for c := range j.choices {
		if j.choices[c].over {
			j.left--
			continue
		}
		if c > 0 {
			if err := p.fork(j, c); err != nil {
				return err
			}
		}
		resume := j.resume(c)
		if len(resume) == 0 {
			if err := p.first(j, c, logits, runs); err != nil {
				return err
			}
		} else if c > 0 {
			if err := p.line(j, c, len(j.spec.Prompt)); err != nil {
				return err
			}
		}
	}
	return nil
}

// first samples the next token of choice c, which is the first one here, logs it and queues it for the gateway. A
// resumed answer that had already ended is left as it is: the decoder will have its end confirmed.
func (p *prefill) first(j *job, c int, logits []float32, runs map[string][]wire.Run) error {
	ch := &j.choices[c]
	index := ch.log.Committed()
	if index > 0 {
		last := j.resume(c)[index-1]
		if stage.FinishOf(&j.spec.Sampling, index-1, last) != wire.FinishNone {
			j.left--
			return nil
		}
	}
	if !j.claim.Held() {
		return mem.ErrFenced
	}
	rec, lp, err := stage.Draw(stage.Prefill, ch.sampler, &j.spec.Sampling, logits, index)
	if err != nil {
		return err
	}
	if err := ch.seq.Append(rec); err != nil {
		return err
	}
	run := wire.Run{
		Request: j.request.ID, Attempt: j.request.Attempt, Choice: c,
		Index: index, IDs: []int32{rec.Token}, Logprobs: lp,
		Finish: stage.FinishOf(&j.spec.Sampling, index, rec.Token),
	}
	if c == 0 {
		run.Cached, run.Computed = j.cached, len(j.spec.Prompt)-j.cached
		run.Pictures, run.Hits = len(j.spec.Pictures), j.hits
	}
	runs[j.request.Gateway] = append(runs[j.request.Gateway], run)
	j.left--
	return nil
}

// send publishes the first tokens of a batch, one message a gateway.
func (p *prefill) send(runs map[string][]wire.Run) {
	for gateway, items := range runs {
		if err := stage.SendTokens(p.Bus, p.ID, gateway, items); err != nil {
			p.Log.Warn("sending first tokens", "gateway", gateway, "error", err) // the gateway will ask again
		}
	}
}

// sweep takes out lanes that are computed and jobs that are done.
func (p *prefill) sweep() {
	keep := p.lanes[:0]
	for _, l := range p.lanes {
		if l.pos < len(l.tokens) {
			keep = append(keep, l)
		}
	}
	clear(p.lanes[len(keep):])
	p.lanes = keep
	for j := range p.jobs {
		if j.left == 0 {
			delete(p.jobs, j)
			j.done <- nil
		}
	}
}
