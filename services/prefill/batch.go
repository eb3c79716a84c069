package prefill

import (
	"fmt"
	"time"

	"trireme.dev/shared/engine"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// run is the batch loop: it computes chunks of the oldest lanes under the row limit until stop is closed.
func (p *prefill) run() {
	var batch []engine.Seq
	var taken []*lane
	for {
		if len(p.lanes) == 0 {
			select {
			case f := <-p.inbox:
				f()
			case <-p.stop:
				return
			}
			continue
		}
		for more := true; more; {
			select {
			case f := <-p.inbox:
				f()
			case <-p.stop:
				return
			default:
				more = false
			}
		}
		batch, taken = p.form(batch[:0], taken[:0])
		if len(batch) == 0 {
			continue
		}
		start := time.Now()
		logits, err := p.text.Forward(batch)
		p.Metrics.Step.Observe(time.Since(start).Seconds())
		if err != nil {
			for _, l := range taken {
				p.drop(l.job, fmt.Errorf("computing a prompt: %w", err))
			}
			continue
		}
		p.advance(batch, taken, logits)
	}
}

// add takes a job into the loop, unless its end has come first.
func (p *prefill) add(j *job) {
	if p.Ended(j.request.ID, -1) {
		j.done <- mem.ErrEnded
		return
	}
	p.jobs[j] = true
	j.left = len(j.choices)
	tokens := append(append([]int32{}, j.spec.Prompt...), j.resume(0)...)
	p.lanes = append(p.lanes, &lane{job: j, pos: j.cached, tokens: tokens})
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
		}
	}
	clear(p.lanes[len(keep):])
	p.lanes = keep
	j.done <- err
}

// end drops the jobs of a request that needs nothing any more.
func (p *prefill) end(request string) {
	for j := range p.jobs {
		if j.request.ID == request {
			p.drop(j, mem.ErrEnded)
		}
	}
}

// form makes the next batch: the oldest lanes first, each with as many rows as fit. A chunk ends with the prompt, so
// that its logits are there for every choice.
func (p *prefill) form(batch []engine.Seq, taken []*lane) ([]engine.Seq, []*lane) {
	rows := p.limits.Rows
	for _, l := range p.lanes {
		if rows == 0 || len(batch) == p.limits.Seqs {
			break
		}
		if !l.job.claim.Held() {
			p.drop(l.job, mem.ErrFenced)
			return batch[:0], taken[:0] // lanes changed under the loop; form again
		}
		n := min(rows, len(l.tokens)-l.pos)
		prompt := len(l.job.spec.Prompt)
		if l.pos < prompt {
			n = min(n, prompt-l.pos)
		}
		seq := l.job.choices[l.choice].seq
		if err := seq.Grow(l.pos + n); err != nil {
			p.drop(l.job, err)
			return batch[:0], taken[:0]
		}
		end := l.pos + n
		batch = append(batch, engine.Seq{
			Tokens: l.tokens[l.pos:end],
			Pos:    l.pos,
			Rope:   l.rope(n),
			Delta:  l.job.delta,
			Blocks: seq.Blocks,
			Visual: l.visual(end),
			Want:   end == prompt || end == len(l.tokens),
		})
		taken = append(taken, l)
		rows -= n
	}
	return batch, taken
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

// advance books a computed batch: seals full blocks, samples where a prompt or a resumed answer is complete, and sends
// the first tokens to their gateways.
func (p *prefill) advance(batch []engine.Seq, taken []*lane, logits [][]float32) {
	tokens := 0
	runs := map[string][]wire.Run{}
	for i, l := range taken {
		n := len(batch[i].Tokens)
		tokens += n
		j := l.job
		if !p.jobs[j] {
			continue
		}
		j.choices[l.choice].seq.Seal(l.pos, l.pos+n)
		l.pos += n
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
	p.Metrics.Rows.Add(float64(tokens))
	p.send(runs)
	p.sweep()
}

// promptDone forks the other choices behind the computed prompt; those with nothing to resume get their first token
// from its logits.
func (p *prefill) promptDone(j *job, logits []float32, runs map[string][]wire.Run) error {
	for c := range j.choices {
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
			tokens := append(append([]int32{}, j.spec.Prompt...), resume...)
			p.lanes = append(p.lanes, &lane{job: j, choice: c, pos: len(j.spec.Prompt), tokens: tokens})
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
	rec, lp := stage.Draw(ch.sampler, &j.spec.Sampling, logits, index)
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
