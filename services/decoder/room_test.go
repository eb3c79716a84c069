package decoder

import (
	"testing"

	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

func TestVictim(t *testing.T) {
	for name, x := range map[string]struct {
		active string // a letter a request; capitals are on another NPU
		want   int    // index, -1: nobody
	}{
		"nobody there":                  {"", -1},
		"alone":                         {"a", -1},
		"the youngest":                  {"abc", 2},
		"not a choice of the oldest":    {"aba", 1},
		"only choices of the oldest":    {"aaa", -1},
		"the youngest choice of others": {"abbaa", 2},
		"the youngest of the NPU":       {"AbcD", 2},
		"alone on its NPU":              {"ABc", -1},
	} {
		t.Run(name, func(t *testing.T) {
			var active []*sequence
			for i, letter := range x.active {
				seat := &stage.Seat{}
				if letter < 'a' {
					seat.NPU = 1
				}
				active = append(active, &sequence{request: wire.Request{ID: x.active[i : i+1]}, choice: i, seat: seat})
			}
			got := -1
			if v := victim(active, 0); v != nil {
				got = v.choice
			}
			if got != x.want {
				t.Errorf("victim %d, want %d", got, x.want)
			}
		})
	}
}
