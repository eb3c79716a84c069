package bus

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/wire"
)

// Errors of Change and Meant.
var (
	// ErrRefused is returned when the instance does not begin the operation.
	ErrRefused = errors.New("refused")
	// ErrNoInstance is returned by Meant, also by errors that say in other words why no one instance is meant.
	ErrNoInstance = errors.New("no such instance")
	// ErrGivenUp is returned when the operation has not come to its commit: everything is as it was.
	ErrGivenUp = errors.New("given up, everything is as it was")
)

const (
	askPatience   = 3 * time.Second        // for an answer, which comes within a second if the instance can be reached
	gonePatience  = 3 * time.Second        // for an instance that does not listen: it may be about to connect anew, as who asks has just done
	successorWait = 100 * time.Millisecond // between two looks whether a successor has ended an operation
)

// Change has a stage instance change, and returns when the operation has ended, or ctx has: what became of it then is on the event
// stream. record is the key of the instance's layout record (wire.LayoutKey), which tells how the operation has ended when the
// instance dies meanwhile. told, if not nil, gets each report on the way. An operation that is in force is no error, whatever went
// wrong behind its commit: that is in the report's Why.
func (b *Bus) Change(ctx context.Context, instance, record string, c wire.Change, told func(*wire.ChangeReport)) (*wire.ChangeReport, error) {
	r := &wire.ChangeReport{ID: c.ID, Kind: c.Kind, Instance: instance, Record: record}
	var silent time.Time // since when the instance does not listen
	for wait := newPause(); ctx.Err() == nil; {
		if b.conn.IsReconnecting() { // the client would send the question when nobody waits for an answer any more
			_ = (&pause{next: awayWait}).sleep(ctx)
			continue
		}
		try, cancel := context.WithTimeout(ctx, askPatience)
		now := new(wire.ChangeReport)
		err := b.Ask(try, wire.SubjectChange(instance), &c, now)
		cancel()
		switch {
		case errors.Is(err, nats.ErrNoResponders):
			if silent.IsZero() {
				silent = time.Now()
			}
			if time.Since(silent) >= gonePatience || b.succeeded(ctx, r) {
				return b.changeEnded(ctx, r)
			}
			_ = (&pause{next: successorWait}).sleep(ctx)
			continue
		case err != nil && permanent(err):
			return r, err
		case err != nil:
			_ = wait.sleep(ctx)
			continue
		}
		wait, silent = newPause(), time.Time{}
		if now.Number != r.Number && told != nil {
			told(now)
		}
		r, c.Seen = now, now.Number
		switch {
		case r.Refused:
			return r, fmt.Errorf("%s of %s %w: %s", r.Kind, instance, ErrRefused, r.Why)
		case r.State == "done":
			return r, nil
		case r.State == "aborted":
			return r, fmt.Errorf("%s of %s %w: %s", r.Kind, instance, ErrGivenUp, r.Why)
		}
	}
	if r.Number == 0 {
		return r, fmt.Errorf("%s of %s: it has not answered, and may begin when it does (`trireme events --kind scale --follow` shows that; `trireme status` "+
			"whether it is alive): %w", c.Kind, instance, context.Cause(ctx))
	}
	return r, fmt.Errorf("%s of %s has not ended, and goes on by itself (`trireme events --kind scale --follow` shows how): %w", c.Kind, instance, context.Cause(ctx))
}

// succeeded reports whether another process has the record of an operation's instance, which is gone then.
func (b *Bus) succeeded(ctx context.Context, r *wire.ChangeReport) bool {
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	l, _, err := b.Layout(ctx, r.Record)
	return err == nil && l.Instance != r.Instance
}

// changeEnded finds out how an operation has ended whose instance is gone: its record says so, once the instance's successor has
// cleared it.
func (b *Bus) changeEnded(ctx context.Context, r *wire.ChangeReport) (*wire.ChangeReport, error) {
	gone := fmt.Sprintf("instance %s is gone", r.Instance)
	for {
		l, _, err := b.Layout(ctx, r.Record)
		switch {
		case err == nil && l.Is(r.ID):
			r.Committed, r.Epoch, r.State = true, l.Epoch, "done"
			r.Why = gone + "; the one in its place starts in the new layout"
			return r, nil
		case err == nil && l.Awaits(r.ID): // until the successor has come
		case err == nil && l.Last != nil && l.Last.ID == r.ID:
			r.State, r.Why = "aborted", cmp.Or(l.Last.Why, gone)
			return r, fmt.Errorf("%s of %s %w: %s", r.Kind, r.Instance, ErrGivenUp, r.Why)
		case err == nil || errors.Is(err, ErrNoLayout):
			r.State, r.Why = "aborted", gone
			return r, fmt.Errorf("%s of %s %w: the instance is gone; once `trireme status` shows it again, or another one, ask again", r.Kind, r.Instance, ErrGivenUp)
		case ctx.Err() == nil:
			return r, err
		}
		if (&pause{next: successorWait}).sleep(ctx) != nil {
			return r, fmt.Errorf("%s of %s: %s, and nothing has come in its place that could say how it ended: %w", r.Kind, r.Instance,
				gone, context.Cause(ctx))
		}
	}
}

// NewChangeID makes an id for a Change.
func NewChangeID() string { return strings.ToLower(rand.Text()[:12]) }

// Meant is the one of the instances that an operator means by encoder, prefill or decoder, where one of these is, or by its id or name.
// which, if not empty, is an id or name that tells several of a role apart.
func Meant(all []wire.Instance, who, which string) (*wire.Instance, error) {
	role := map[string]string{"encoder": StageEncode, "prefill": StagePrefill, "decoder": StageDecode}[who]
	fits := func(i *wire.Instance) bool {
		named := func(s string) bool { return i.ID == s || i.Name != "" && i.Name == s }
		return i.Role != "gateway" && (role == "" && named(who) || role != "" && wire.HasRole(i.Role, role)) && (which == "" || named(which))
	}
	var found []wire.Instance
	var names []string
	for _, i := range all {
		if fits(&i) {
			found = append(found, i)
			names = append(names, cmp.Or(i.Name, i.ID))
		}
	}
	switch {
	case len(found) == 1:
		return &found[0], nil
	case len(found) == 0 && slices.ContainsFunc(all, func(i wire.Instance) bool {
		return i.Role == "gateway" && (who == "gateway" || who == i.ID || who == i.Name)
	}):
		return nil, notMeant(who + ": a gateway has no NPUs: name an encoder, prefill instance or decoder")
	case len(found) == 0:
		return nil, fmt.Errorf("%w: %s; `trireme status` shows those that run; one that is just starting, or NATS with it, is there in a moment", ErrNoInstance, strings.TrimSpace(who+" "+which))
	}
	return nil, notMeant(fmt.Sprintf("there are %d instances with the role %s, say which: %s", len(found), who, strings.Join(names, ", ")))
}

// notMeant is an ErrNoInstance that says in words of its own what is wrong.
type notMeant string

func (n notMeant) Error() string { return string(n) }

// Is has it be an ErrNoInstance.
func (notMeant) Is(target error) bool { return target == ErrNoInstance }
