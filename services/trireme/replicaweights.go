package main

import (
	"encoding/hex"
	"fmt"
	"strings"

	"trireme.dev/shared/conf"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// foresee says what the weights of instances take that are to be started: needs is what one has, in all memory domains of its NPUs, fresh what
// domains of the node have to get for all of them, by copies from one another or from the files. spare are the NPUs that they will have.
func foresee(model string, g conf.Group, more int, spare []int, perNPU bool, has []hbm.WeightsStats) (needs, fresh int64, err error) {
	f, err := hf.Open(model)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	if len(spare) < more*g.NPUs {
		return 0, 0, fmt.Errorf("%d NPUs are spare, and %d wanted", len(spare), more*g.NPUs)
	}
	var parts []hf.Parts
	if g.Roles != "E" {
		parts = append(parts, hf.Text)
	}
	if strings.Contains(g.Roles, "E") && f.Config.Vision != nil {
		parts = append(parts, hf.Vision)
	}
	type place struct {
		domain int
		key    string
	}
	there := map[place]int{} // objects
	for _, w := range has {
		if w.Loaded == w.Bytes {
			there[place{w.Domain, w.Key}] = w.Objects
		}
	}
	layout := stage.Layout(&f.Config.Text, placement.First(g.NPUs))
	for i := range more {
		domains := map[int]placement.Set{} // their slots
		for slot, npu := range spare[i*g.NPUs : (i+1)*g.NPUs] {
			domain := 1
			if perNPU {
				domain += npu
			}
			domains[domain] = domains[domain].With(slot)
		}
		for domain, slots := range domains {
			wanted := func(layer, expert int) bool { return layout[layer][expert]&slots != 0 }
			for _, part := range parts {
				set, err := f.Needs(part, wanted)
				if err != nil {
					return 0, 0, err
				}
				all, err := f.Needs(part, nil)
				if err != nil {
					return 0, 0, err
				}
				var bytes int64
				for _, n := range set.Sizes {
					bytes += n
				}
				if i == 0 {
					needs += bytes
				}
				// Nobody says which objects a domain has that has not all, so it counts as having none.
				if at := (place{domain, hex.EncodeToString(set.Key[:])}); there[at] < len(all.Numbers) {
					fresh += bytes
					there[at] = len(all.Numbers) // for those that come after this one
				}
			}
		}
	}
	return needs, fresh, nil
}

// weigh adds to the plan of a change of the number of instances what their weights take.
func (r *replicas) weigh(report *wire.ReplicasReport, g conf.Group, more int, has grants) {
	if r.model == "" {
		return
	}
	var err error
	if report.Weights, report.Fresh, err = foresee(r.model, g, more, has.spare, has.perNPU, has.weights); err != nil {
		fmt.Fprintf(r.out, "foreseeing the weights of new instances: %v\n", err)
	}
}
