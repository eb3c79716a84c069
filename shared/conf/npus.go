package conf

import (
	"errors"
	"fmt"
	"strconv"

	"trireme.dev/shared/sched/placement"
)

// ErrNPUs is wrapped by errors about numbers of NPUs.
var ErrNPUs = errors.New("no number of NPUs")

// NPUCount is how many NPUs an instance is to have, as operators write it: 4, or how many more or fewer, +1, -2.
type NPUCount struct {
	n        int
	relative bool
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *NPUCount) UnmarshalText(text []byte) error {
	n, err := strconv.Atoi(string(text))
	if err != nil || n > placement.MaxNPUs || n < -placement.MaxNPUs {
		return fmt.Errorf("%q is %w: write 4, +1 or -2", text, ErrNPUs)
	}
	c.n, c.relative = n, text[0] == '+' || text[0] == '-'
	return nil
}

// Of is how many NPUs an instance that has so many is to have.
func (c NPUCount) Of(has int) (int, error) {
	n := c.n
	if c.relative {
		n += has
	}
	if n < 0 || n > placement.MaxNPUs {
		return 0, fmt.Errorf("%w: an instance of %d NPUs cannot have %d: 0 (a standby) to %d", ErrNPUs, has, n, placement.MaxNPUs)
	}
	return n, nil
}
