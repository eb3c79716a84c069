package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
)

// What the status of a command is that has ended, by itself or as a signal wanted it.
func TestReport(t *testing.T) {
	canceled := fmt.Errorf("changing: %w", context.Canceled)
	for name, c := range map[string]struct {
		err, cause error
		service    bool
		status     int
		says       bool
	}{
		"done":                               {nil, nil, false, 0, false},
		"done in the moment of a signal":     {nil, interrupted(syscall.SIGINT), false, 0, false},
		"Ctrl-C":                             {canceled, interrupted(syscall.SIGINT), false, 130, false},
		"SIGTERM":                            {canceled, interrupted(syscall.SIGTERM), false, 143, false},
		"its own cause":                      {fmt.Errorf("run 3: %w", interrupted(syscall.SIGINT)), interrupted(syscall.SIGINT), false, 130, false},
		"a service that is told to end":      {canceled, interrupted(syscall.SIGTERM), true, 0, false},
		"cancelled by nobody outside":        {canceled, nil, false, exitFailed, true},
		"failed":                             {errors.New("no"), nil, false, exitFailed, true},
		"failed in the moment of a signal":   {errors.New("no"), interrupted(syscall.SIGINT), false, exitFailed, true},
		"cannot be done":                     {fmt.Errorf("%wno", errUsage), nil, false, exitUsage, true},
		"a service that cannot be done with": {fmt.Errorf("%wno", errUsage), nil, true, exitUsage, true},
	} {
		var said bytes.Buffer
		status := report(&said, "bench scale <x>", c.err, c.cause, c.service)
		if says := strings.HasPrefix(said.String(), "trireme bench scale: "); status != c.status || says != c.says {
			t.Errorf("%s: status %d, said %q; want %d", name, status, &said, c.status)
		}
	}
}
