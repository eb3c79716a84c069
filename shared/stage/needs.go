package stage

import (
	"encoding/hex"
	"fmt"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/wire"
)

// source is what instances with the same roles have their weights of.
type source struct {
	folder *hf.Folder
	parts  hf.Parts
}

// newSource takes the roles as an instance has them, encode+prefill.
func newSource(f *hf.Folder, roles string) source {
	s := source{folder: f}
	for _, role := range wire.Roles(roles) {
		if role == Encode {
			s.parts |= hf.Vision
		} else {
			s.parts |= hf.Text
		}
	}
	return s
}

// object names an object of a weight set.
type object struct {
	key    [32]byte
	number int
}

// each are the parts of the model that the roles need.
func (s *source) each() (parts []hf.Parts) {
	for _, part := range []hf.Parts{hf.Text, hf.Vision} {
		if s.parts&part != 0 && (part != hf.Vision || s.folder.Config.Vision != nil) {
			parts = append(parts, part)
		}
	}
	return parts
}

// needs are the objects of what the roles need with some experts, with their sizes in bytes.
func (s *source) needs(experts hf.Experts) (map[object]int64, error) {
	all := map[object]int64{}
	for _, part := range s.each() {
		set, err := s.folder.Needs(part, experts)
		if err != nil {
			return nil, err
		}
		for i, n := range set.Numbers {
			all[object{set.Key, n}] = set.Sizes[i]
		}
	}
	return all, nil
}

// group are the NPUs of an instance that are in one memory domain.
type group struct {
	slots   placement.Set
	numbers []int
}

// groups are the NPUs of these numbers, by slot, by memory domain.
func groups(numbers []int, domain func(npu int) int) map[int]group {
	all := map[int]group{}
	for slot, n := range numbers {
		if n >= 0 {
			d := domain(n)
			g := all[d]
			all[d] = group{g.slots.With(slot), append(g.numbers, n)}
		}
	}
	return all
}

// wanted are the experts that some NPUs of an instance on these have: all, where all NPUs are.
func wanted(numbers []int, layout placement.Layout, some placement.Set) hf.Experts {
	for slot, n := range numbers {
		if n >= 0 && !some.Has(slot) {
			return func(layer, expert int) bool { return layout[layer][expert]&some != 0 }
		}
	}
	return nil
}

// whole are the weight sets of which a memory domain has every object, whoever uses them.
type whole struct {
	sets map[setIn]bool
	keys map[hf.Parts][32]byte
}

type setIn struct {
	domain int
	key    [32]byte
}

// whole picks from what the domains of a node have. What a domain has only a part of does not count: nobody says which.
func (s *source) whole(has []hbm.WeightsStats) (whole, error) {
	all := whole{sets: map[setIn]bool{}, keys: map[hf.Parts][32]byte{}}
	objects, parts := map[string]int{}, map[string][32]byte{}
	for _, part := range s.each() {
		set, err := s.folder.Needs(part, nil)
		if err != nil {
			return whole{}, err
		}
		name := hex.EncodeToString(set.Key[:])
		all.keys[part], objects[name], parts[name] = set.Key, len(set.Numbers), set.Key
	}
	for _, x := range has {
		if n := objects[x.Key]; n > 0 && x.Objects == n && x.Loaded == x.Bytes {
			all.sets[setIn{x.Domain, parts[x.Key]}] = true
		}
	}
	return all, nil
}

// has reports whether a domain has all of a part of the model.
func (a *whole) has(domain int, part hf.Parts) bool { return a.sets[setIn{domain, a.keys[part]}] }

// lacks are the objects that are in no such set of a domain.
func (a *whole) lacks(domain int, needs map[object]int64) map[object]int64 {
	lacking := map[object]int64{}
	for x, n := range needs {
		if !a.sets[setIn{domain, x.key}] {
			lacking[x] = n
		}
	}
	return lacking
}

func sum(objects map[object]int64) (bytes int64) {
	for _, n := range objects {
		bytes += n
	}
	return bytes
}

// Foresee says what the weights of new instances with these roles (encode+prefill) take, in bytes: each is what the first has in use, in all memory
// domains of its NPUs, fresh what domains have to get for all of them by copies from one another or from the files. npus are the numbers of
// each one's NPUs, by slot; has is what the domains of the node have now.
func Foresee(f *hf.Folder, roles string, npus [][]int, domain func(npu int) int, has []hbm.WeightsStats) (each, fresh int64, err error) {
	s := newSource(f, roles)
	there, err := s.whole(has)
	if err != nil {
		return 0, 0, fmt.Errorf("foreseeing the weights of new instances: %w", err)
	}
	type place struct {
		domain int
		object object
	}
	got := map[place]bool{} // by those before
	for i, numbers := range npus {
		layout := Layout(&f.Config.Text, placement.First(len(numbers)))
		for d, g := range groups(numbers, domain) {
			needs, err := s.needs(wanted(numbers, layout, g.slots))
			if err != nil {
				return 0, 0, fmt.Errorf("foreseeing the weights of new instances: %w", err)
			}
			if i == 0 {
				each += sum(needs)
			}
			for x, n := range there.lacks(d, needs) {
				if at := (place{d, x}); !got[at] {
					got[at] = true
					fresh += n
				}
			}
		}
	}
	return each, fresh, nil
}
