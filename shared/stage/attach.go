package stage

import (
	"context"
	"errors"
	"fmt"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/model"
	"trireme.dev/shared/sched/placement"
)

// AttachOptions say how weights are attached.
type AttachOptions struct {
	Rate int64                   // most bytes a second that are copied from other memory domains, beside serving; 0: as fast as it goes
	Told func(done, total int64) // told now and then of the bytes that are there, by one goroutine at a time; nil: nobody is

	pace  *hbm.Pacer // of Rate, for all that is attached together
	again bool       // what is there is copied, too: see Without
}

// Attached are the weights of an NPU.
type Attached struct {
	Weights *model.Weights   // with the experts that were wanted
	Experts [][]model.Expert // the same by layer, for engine.NPU: empty ones are on other NPUs
	Bytes   int64            // that this process had not mapped of the NPU's memory domain
	Copied  int64            // of Bytes: copied from other memory domains
	Read    int64            // of Bytes: read from the files; all else was there

	fresh []*hbm.Weights // with Bytes
}

// AttachWeights gives an NPU, by its number on the node, which this stage has been granted, the weights that its roles need with those
// experts and no others: what its memory domain has not is copied from another domain of the node, or read from the files. It goes
// beside serving; nothing that is in use changes, and what the NPU has is kept until DropWeights. All or nothing: after an error, or
// when ctx ends, the NPU has what it had.
func (s *Stage) AttachWeights(ctx context.Context, npu int, wanted hf.Experts, o AttachOptions) (Attached, error) {
	o.pace = hbm.NewPacer(o.Rate)
	a, err := s.weights.attach(ctx, []int{npu}, wanted, o)
	if err != nil {
		return a, fmt.Errorf("attaching weights to NPU %d: %w", npu, err)
	}
	return a, nil
}

// attach does so for NPUs of one memory domain.
func (w *weights) attach(ctx context.Context, npus []int, wanted hf.Experts, o AttachOptions) (_ Attached, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.stage
	domain := s.HBM.Domain(npus[0])
	has := w.domains[domain]
	if has == nil {
		has = map[object]*held{}
		w.domains[domain] = has
	}
	defer func() {
		err = errors.Join(err, sweep(has)) // what came before an error
	}()
	m := &domainMemory{weights: w, npu: npus[0], o: o, has: has}
	loaded, err := s.folder.Load(ctx, m, w.parts, wanted)
	if err != nil {
		return Attached{}, err
	}
	for _, x := range m.asked {
		for _, n := range npus {
			has[x].users[n] = true
		}
	}
	m.got.Weights = loaded
	for l := range loaded.Layers {
		m.got.Experts = append(m.got.Experts, loaded.Layers[l].Experts)
	}
	return m.got, nil
}

// DropWeights takes experts from an NPU that it has and that are not to be kept. No step may use them any more. What no other NPU of this
// stage in the same memory domain has is unmapped; it rests with the HMM.
func (s *Stage) DropWeights(npu int, keep hf.Experts) error {
	kept, err := s.weights.needs(keep)
	if err != nil {
		return fmt.Errorf("dropping weights of NPU %d: %w", npu, err)
	}
	return s.weights.drop(npu, kept)
}

// costs is what another layout, on NPUs of other numbers by slot, needs in bytes: fresh is what some memory domain has to get, there being
// what some have, beside which the larger of both layouts and over bytes more are in use until the old one is let go.
func (w *weights) costs(
	there whole, npus []int, layout placement.Layout, next []int, then placement.Layout,
) (fresh, over int64, err error) {
	var before, after int64
	was, will := groups(npus, w.stage.HBM.Domain), groups(next, w.stage.HBM.Domain)
	for domain, g := range was {
		has, err := w.needs(wanted(npus, layout, g.slots))
		if err != nil {
			return 0, 0, err
		}
		before += sum(has)
		if _, stays := will[domain]; !stays {
			continue
		}
		needs, err := w.needs(wanted(next, then, will[domain].slots))
		if err != nil {
			return 0, 0, err
		}
		after += sum(needs)
		for x := range has {
			delete(needs, x)
		}
		fresh += sum(there.lacks(domain, needs))
	}
	for domain, g := range will {
		if _, had := was[domain]; had {
			continue
		}
		needs, err := w.needs(wanted(next, then, g.slots))
		if err != nil {
			return 0, 0, err
		}
		after, fresh = after+sum(needs), fresh+sum(there.lacks(domain, needs))
	}
	return fresh, max(0, before+fresh-max(before, after)), nil
}

// ReleaseWeights takes all weights from an NPU, which is to leave the stage, as DropWeights does.
func (s *Stage) ReleaseWeights(npu int) error { return s.weights.drop(npu, nil) }

func (w *weights) drop(npu int, kept map[object]int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	has := w.domains[w.stage.HBM.Domain(npu)]
	for x, h := range has {
		if _, stays := kept[x]; !stays {
			delete(h.users, npu)
		}
	}
	if err := sweep(has); err != nil {
		return fmt.Errorf("dropping weights of NPU %d: %w", npu, err)
	}
	return nil
}

// sweep unmaps what no NPU has.
func sweep(has map[object]*held) error {
	unused := map[*hbm.Weights][]int{}
	for x, h := range has {
		if len(h.users) == 0 {
			unused[h.set] = append(unused[h.set], x.number)
			delete(has, x)
			if h.before != nil {
				has[x] = h.before
			}
		}
	}
	var errs []error
	for set, numbers := range unused {
		errs = append(errs, set.Drop(numbers...))
	}
	return errors.Join(errs...)
}
