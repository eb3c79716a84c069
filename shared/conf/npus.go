package conf

import (
	"errors"
	"fmt"
	"strconv"

	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/wire"
)

// ErrNPUs is wrapped by errors about numbers of NPUs.
var ErrNPUs = errors.New("no number of NPUs")

// NPUCount is how many NPUs an instance is to have, as operators write it: 4, or how many more or fewer, +1, -2. Who has the instance knows of how
// many: what others have heard of it may be a second old.
type NPUCount struct {
	n        int
	relative bool
}

// Change is what a wire.Change says of it: NPUs, or wire.ByNPUs and by how many.
func (c NPUCount) Change() (npus, by int) {
	if c.relative {
		return wire.ByNPUs, c.n
	}
	return c.n, 0
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *NPUCount) UnmarshalText(text []byte) error {
	n, err := strconv.Atoi(string(text))
	if err != nil {
		return fmt.Errorf("%q is %w: write 4, +1 or -2", text, ErrNPUs)
	}
	if n > placement.MaxNPUs || n < -placement.MaxNPUs {
		return fmt.Errorf("%q is %w: an instance has 0 (a standby) to %d", text, ErrNPUs, placement.MaxNPUs)
	}
	c.n, c.relative = n, text[0] == '+' || text[0] == '-'
	return nil
}
