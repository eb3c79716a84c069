package stage

import (
	"fmt"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/engine/sample"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/wire"
)

// SampleParams turns wire parameters into the sampler's for one choice.
func SampleParams(s *wire.Sampling, choice int) sample.Params {
	return sample.Params{
		Choice:      uint32(choice),
		Temperature: s.Temperature, TopP: s.TopP, MinP: s.MinP, TopK: s.TopK, Seed: s.Seed,
		Presence: s.Presence, Frequency: s.Frequency, Repetition: s.Repetition,
		MinTokens: s.MinTokens, Stop: s.Stop, TopLogprobs: s.Logprobs,
	}
}

// FinishOf says whether token, at index of the answer, is its last one.
func FinishOf(s *wire.Sampling, index int, token int32) wire.Finish {
	for _, id := range s.Stop {
		if id == token && index >= s.MinTokens {
			return wire.FinishStop
		}
	}
	if index+1 >= s.MaxTokens {
		return wire.FinishLength
	}
	return wire.FinishNone
}

// CodeNoNumbers is the code of a Fault for logits that are no numbers.
const CodeNoNumbers = "model_gave_nan"

// Draw samples the token at index in a stage, as a log record and, when logprobs are wanted, as a run's logprobs. The error is a Fault: where
// logits are no numbers the token would be nothing that the model says. Single ones the sampler passes over.
func Draw(stage string, smp *sample.Sampler, s *wire.Sampling, logits []float32, index int) (kv.Record, []wire.Logprob, error) {
	token, logprob, top := smp.Next(logits, index)
	if of := logits[token]; of != of || logprob != logprob {
		return kv.Record{}, nil, &Fault{Status: 500, Code: CodeNoNumbers, Err: fmt.Errorf(
			"the model gave NaN for token %d of the answer, in %s: its weights are damaged, or of a kind that this server does not compute", index+1, stage)}
	}
	rec := kv.Record{Index: index, Token: token, Logprob: logprob}
	if s.Logprobs < 0 {
		return rec, nil, nil
	}
	lp := wire.Logprob{Own: logprob}
	for _, t := range top {
		lp.IDs = append(lp.IDs, t.Token)
		lp.Top = append(lp.Top, t.Logprob)
	}
	rec.TopIDs, rec.Top = lp.IDs, lp.Top
	return rec, []wire.Logprob{lp}, nil
}

// Replay reads tokens [from, committed) of a log as runs for the gateway, in pieces that fit messages.
func Replay(log *kv.Log, s *wire.Sampling, generation uint64, from int) ([]wire.Run, error) {
	shape := log.Shape()
	size := idSize
	if s.Logprobs >= 0 {
		size += logprobSize(shape.Top)
	}
	piece := (budget - runSize(&wire.Run{})) / size
	var runs []wire.Run
	for end := log.Committed(); from < end; {
		run := wire.Run{
			Request: shape.Request, Attempt: shape.Attempt, Choice: shape.Choice, Generation: generation, Index: from,
		}
		for ; from < end && len(run.IDs) < piece; from++ {
			rec, err := log.Record(from)
			if err != nil {
				return nil, fmt.Errorf("reading the token log of %s/%d: %w", shape.Request, shape.Choice, err)
			}
			run.IDs = append(run.IDs, rec.Token)
			if s.Logprobs >= 0 {
				run.Logprobs = append(run.Logprobs, wire.Logprob{Own: rec.Logprob, IDs: rec.TopIDs, Top: rec.Top})
			}
			run.Finish = FinishOf(s, from, rec.Token)
		}
		runs = append(runs, run)
	}
	return runs, nil
}

// budget is the most bytes of runs in one message.
const budget = wire.MaxMessage - 4096

// SendTokens sends runs to a gateway in as few messages as the size limit allows.
func SendTokens(b *bus.Bus, instance, gateway string, runs []wire.Run) error {
	for len(runs) > 0 {
		size, n := 0, 0
		for n < len(runs) {
			size += runSize(&runs[n])
			if n > 0 && size > budget {
				break
			}
			n++
		}
		if err := b.Send(wire.SubjectTokens(gateway), &wire.Tokens{Instance: instance, Items: runs[:n]}); err != nil {
			return err
		}
		runs = runs[n:]
	}
	return nil
}

// runSize is an upper bound of an encoded run, in bytes.
func runSize(r *wire.Run) int {
	n := 112 + idSize*len(r.IDs)
	for i := range r.Logprobs {
		n += logprobSize(len(r.Logprobs[i].IDs))
	}
	return n
}

// idSize is an upper bound of an encoded token id, in bytes.
const idSize = 5

// logprobSize is an upper bound of an encoded log probability with so many alternatives, in bytes.
func logprobSize(alternatives int) int { return 12 + 10*alternatives }
