package decoder

import (
	"errors"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// outbox collects the tokens of one step by gateway; its buffers are used again.
type outbox struct {
	sender   string
	gateways []mail
}

type mail struct {
	gateway string
	runs    []wire.Run
	tokens  []int32
}

// add queues the newest token of s.
func (o *outbox) add(s *sequence, lp []wire.Logprob) {
	m := o.mail(s.request.Gateway)
	m.tokens = append(m.tokens, s.last)
	m.runs = append(m.runs, wire.Run{
		Request: s.request.ID, Attempt: s.request.Attempt, Choice: s.choice, Generation: s.claim.Generation(),
		Index: s.answer - 1, IDs: m.tokens[len(m.tokens)-1:], Logprobs: lp, Finish: s.finish(),
	})
}

func (o *outbox) mail(gateway string) *mail {
	for i := range o.gateways {
		if o.gateways[i].gateway == gateway {
			return &o.gateways[i]
		}
	}
	o.gateways = append(o.gateways, mail{gateway: gateway})
	return &o.gateways[len(o.gateways)-1]
}

// flush sends what was queued, one message a gateway. A message that does not arrive is asked for again.
func (o *outbox) flush(b *bus.Bus) error {
	var errs []error
	for i := range o.gateways {
		m := &o.gateways[i]
		if len(m.runs) == 0 {
			continue
		}
		errs = append(errs, stage.SendTokens(b, o.sender, m.gateway, m.runs))
		m.runs, m.tokens = m.runs[:0], m.tokens[:0]
	}
	return errors.Join(errs...)
}
