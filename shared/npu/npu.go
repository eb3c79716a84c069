// Package npu opens the compute backend of an NPU: the one place where backends are chosen.
package npu

import (
	"fmt"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kernel/cpu"
	"trireme.dev/shared/kernel/ref"
	"trireme.dev/shared/npu/pace"
)

// Options says which backend to open.
type Options struct {
	Backend string // "host" (default) or "reference", the slow plain-Go kernels
	Threads int    // worker threads of a host NPU; 0: all cores
	Pace    string // name or file of a profile (shared/npu/pace) that the NPU is slowed down to; "": as fast as it is
}

// Open returns the arithmetic of one NPU, a *pace.Compute if it is paced. The caller closes it.
func Open(o Options) (kernel.Compute, error) {
	if o.Pace == "" {
		return open(o)
	}
	p, err := pace.Load(o.Pace)
	if err != nil {
		return nil, fmt.Errorf("opening a paced NPU: %w", err)
	}
	c, err := open(o)
	if err != nil {
		return nil, err
	}
	return pace.New(c, p), nil
}

func open(o Options) (kernel.Compute, error) {
	switch o.Backend {
	case "", "host":
		c, err := cpu.New(cpu.Options{Threads: o.Threads})
		if err != nil {
			return nil, fmt.Errorf("opening the host NPU: %w", err)
		}
		return c, nil
	case "reference":
		return ref.New(), nil
	}
	return nil, fmt.Errorf("opening an NPU: no backend %q; there are host and reference", o.Backend)
}
