package conf

import (
	"errors"
	"testing"

	"trireme.dev/shared/wire"
)

func TestNPUCount(t *testing.T) {
	for said, want := range map[string][2]int{
		"4": {4, 0}, "+1": {wire.ByNPUs, 1}, "-2": {wire.ByNPUs, -2}, "64": {64, 0}, "0": {0, 0}, "-0": {wire.ByNPUs, 0},
	} {
		var c NPUCount
		err := c.UnmarshalText([]byte(said))
		if npus, by := c.Change(); err != nil || npus != want[0] || by != want[1] {
			t.Errorf("%q: %d, by %d, %v; want %v", said, npus, by, err, want)
		}
	}
	for _, said := range []string{"65", "-65", "+65", "many", "", "2x", "--2"} {
		var c NPUCount
		if err := c.UnmarshalText([]byte(said)); !errors.Is(err, ErrNPUs) {
			t.Errorf("%q: %+v, %v", said, c, err)
		}
	}
}
