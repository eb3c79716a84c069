package main

import (
	"trireme.dev/shared/bus"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// foresee adds to the plan of a change of the number of instances what the weights of more of a group take, on NPUs that are spare.
func (r *replicas) foresee(report *wire.ReplicasReport, g *replicaGroup, more int, has grants) error {
	if r.model == "" {
		return nil
	}
	f, err := hf.Open(r.model)
	if err != nil {
		return err
	}
	defer f.Close()
	roles, err := bus.RoleNamed(g.Roles)
	if err != nil {
		return err
	}
	npus := make([][]int, more)
	for i := range npus {
		npus[i] = has.spare[i*g.NPUs : (i+1)*g.NPUs]
	}
	domain := func(npu int) int {
		if has.perNPU {
			return 1 + npu
		}
		return 1
	}
	report.Weights, report.Fresh, err = stage.Foresee(f, roles, npus, domain, has.weights)
	return err
}
