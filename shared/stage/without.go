package stage

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sync/errgroup"

	"trireme.dev/shared/hbm"
)

// Without takes from a stage what makes changes cheap, to measure what that is worth. Answers stay the same.
type Without struct {
	// Remap: what an NPU has and keeps is copied to fresh memory of its domain instead of being mapped where it is, as it has to be where
	// all experts of an NPU are one tensor in one piece of memory.
	Remap bool
	// Copies: what another memory domain has is read from the files, at Config.DiskRate.
	Copies bool
}

// The words for Without, as the command line has them.
const (
	WithoutRemap  = "remap"
	WithoutCopies = "copies"
)

// ParseWithout reads them.
func ParseWithout(words []string) (w Without, err error) {
	for _, word := range words {
		switch word {
		case WithoutRemap:
			w.Remap = true
		case WithoutCopies:
			w.Copies = true
		default:
			return w, fmt.Errorf("without %q: there are %s and %s", word, WithoutRemap, WithoutCopies)
		}
	}
	return w, nil
}

// again has the domain's memory get a second copy of objects that it has, for the next epoch: keep drops the first ones behind the switch, or
// the second ones if it does not come to that.
func (m *domainMemory) again(ctx context.Context, key [32]byte, set hbm.WeightSet) error {
	m.renewed++
	set.Key = sha256.Sum256(binary.LittleEndian.AppendUint64(append(key[:], m.stage.ID...), m.renewed)) // which nobody else asks for
	fresh, err := m.stage.HBM.OpenWeights(ctx, m.npu, set, func(ctx context.Context, numbers []int, objects [][]byte) error {
		g, ctx := errgroup.WithContext(ctx)
		g.SetLimit(max(1, runtime.GOMAXPROCS(0)/4)) // beside serving
		for i, n := range numbers {
			g.Go(func() error {
				h := m.has[object{key, n}]
				copy(objects[i], h.set.Objects[h.at])
				return ctx.Err()
			})
		}
		return g.Wait()
	}, nil)
	if err != nil {
		return err
	}
	for i, n := range fresh.Numbers {
		x := object{key, n}
		m.has[x] = &held{set: fresh, at: i, users: map[int]bool{}, before: m.has[x]}
	}
	return nil
}

// renew has the second copies be the present ones. w.mu is held.
func (w *weights) renew() {
	for _, mapped := range w.domains {
		for _, h := range mapped {
			if h.before != nil {
				w.past, h.before = append(w.past, past{h.before.set, h.before.set.Numbers[h.before.at]}), nil
			}
		}
	}
}

// past is an object that the epoch before had.
type past struct {
	set    *hbm.Weights
	number int
}

// dropPast drops what the epoch before had, and second copies that it did not come to. w.mu is held.
func (w *weights) dropPast() error {
	var errs []error
	for _, p := range w.past {
		errs = append(errs, p.set.Drop(p.number))
	}
	w.past = nil
	for _, mapped := range w.domains {
		for _, h := range mapped {
			if h.before != nil {
				clear(h.users)
			}
		}
		errs = append(errs, sweep(mapped))
	}
	return errors.Join(errs...)
}
