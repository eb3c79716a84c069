package stage

import (
	"context"
	"fmt"
	"slices"
	"time"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/wire"
)

// A message that an instance had taken and not yet claimed when it died is in nobody's books, and would wait for AckWait. So
// would one whose request ended before its orphaned claim was handed out. One sibling looks for such strays.

const (
	// strayWait is the time between two looks at the queue. A message in work that is unclaimed at both is a stray: a live
	// instance claims what it takes at once. If it was too slow it is fenced by whoever gets the message next, or fences
	// that one.
	strayWait = 100 * time.Millisecond
	// maxStrays is how many messages are looked at; what is in work beyond them is left to AckWait.
	maxStrays = 1 << 12
)

// handBackStrays gives strays back to a role's queue, if an instance that had it is gone and nobody has looked yet.
func (s *Stage) handBackStrays(ctx context.Context, role string) {
	if gone, err := s.HBM.Gone(ctx, role); err != nil || !gone || s.elsewhere(ctx, role) {
		return
	}
	given, err := s.strays(ctx, role)
	if err != nil && ctx.Err() == nil {
		s.Log.Warn("looking for messages that a gone instance had taken", "error", err)
	}
	if given > 0 {
		s.Log.Info("handed back what a gone instance had not claimed", "messages", given)
	}
}

// elsewhere reports whether instances that have a role run on other nodes, or may: what they have claimed is not known here.
func (s *Stage) elsewhere(ctx context.Context, role string) bool {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	all, err := s.Bus.Instances(ctx) // looked at now and then only
	if err != nil {
		return true
	}
	return slices.ContainsFunc(all.Role(role), func(i wire.Instance) bool { return i.Node != s.HBM.Node() })
}

func (s *Stage) strays(ctx context.Context, role string) (given int, err error) {
	if err := pause(ctx, deadWait); err != nil { // for the server to see that the connection has ended
		return 0, err
	}
	first, err := s.unclaimed(ctx, role)
	if err != nil || len(first) == 0 {
		return 0, err
	}
	if err := pause(ctx, strayWait); err != nil {
		return 0, err
	}
	second, err := s.unclaimed(ctx, role)
	for seq, m := range second {
		if _, ok := first[seq]; !ok {
			continue
		}
		if err := s.Bus.NakReply(m.Reply, 0); err != nil {
			return given, err
		}
		given++
	}
	return given, err
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// unclaimed returns the messages of a role's queue that are in work and whose part nobody has claimed.
func (s *Stage) unclaimed(ctx context.Context, role string) (map[uint64]bus.Taken, error) {
	taken, err := s.Bus.InWork(ctx, role, maxStrays)
	if err != nil {
		return nil, err
	}
	of := map[hbm.Part]bus.Taken{}
	var parts []hbm.Part
	for _, m := range taken {
		p, err := partOf(role, m.Data)
		if err != nil {
			continue // whoever gets it drops it
		}
		p.Left = 0
		of[p] = m
		parts = append(parts, p)
	}
	open, err := s.HBM.Unclaimed(ctx, parts)
	if err != nil {
		return nil, err
	}
	found := make(map[uint64]bus.Taken, len(open))
	for _, p := range open {
		found[of[p].Seq] = of[p]
	}
	return found, nil
}

// partOf says what a message of a stage's queue is claimed as.
func partOf(role string, data []byte) (hbm.Part, error) {
	var req wire.Request
	part := 0
	var err error
	switch role {
	case Encode:
		var m wire.Encode
		err = wire.Unmarshal(data, &m)
		req, part = m.Request, m.Part
	case Prefill:
		var m wire.Prefill
		err = wire.Unmarshal(data, &m)
		req = m.Request
	case Decode:
		var m wire.Decode
		err = wire.Unmarshal(data, &m)
		req, part = m.Request, m.Choice
	default:
		err = fmt.Errorf("BUG: no stage is called %q", role)
	}
	return hbm.Part{Request: req.ID, Attempt: req.Attempt, Left: req.Left, Stage: role, Part: part}, err
}
