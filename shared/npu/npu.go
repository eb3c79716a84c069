// Package npu opens the compute backend of an NPU: the one place where backends are chosen.
package npu

import (
	"fmt"

	"trireme.dev/shared/kernel"
	"trireme.dev/shared/kernel/cpu"
	"trireme.dev/shared/kernel/ref"
)

// Options says which backend to open.
type Options struct {
	Backend string // "host" (default) or "reference", the slow plain-Go kernels
	Threads int    // worker threads of a host NPU; 0: all cores
}

// Open returns the arithmetic of one NPU. The caller closes it.
func Open(o Options) (kernel.Compute, error) {
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
