package hmm_test

import (
	"testing"

	"trireme.dev/shared/hbm"
)

// Who dies while it runs a part leaves a strike with it, unless it came further than anybody before; whoever claims it next
// is told, and progress ends that. A client that takes leave has not died.
func TestStrikesOfAKilledProcess(t *testing.T) {
	d, socket := daemon(t)
	for deaths := 1; deaths <= 4; deaths++ {
		cmd, _ := start(t, "runner", socket)
		kill(t, cmd)
		eventually(t, "the connection is gone", func() bool { return d.Stats().Connections == 0 })
		c := dial(t, socket, hbm.Hello{Instance: "next"})
		var claims []*hbm.Claim
		for i := range 3 {
			claims = append(claims, claim(t, c, decodePart("r", 1, i), ""))
		}
		last := deaths - 1 // it got to the same place as the first
		if a, b, c := claims[0].Strikes(), claims[1].Strikes(), claims[2].Strikes(); a != deaths || b != 0 || c != last {
			t.Fatalf("after %d deaths: %d, %d and %d strikes, want %d, 0 and %d", deaths, a, b, c, deaths, last)
		}
		claims[0].Run()
		if deaths == 4 {
			if claims[2].Progress(7) || !claims[2].Progress(8) || claims[2].Progress(9) || claims[2].Strikes() != 0 {
				t.Error("going further than anybody before does not end strikes, once")
			}
			must(t, c.Unclaim(t.Context(), claims[2]))
			if again := claim(t, c, decodePart("r", 1, 2), ""); again.Strikes() != 0 {
				t.Errorf("%d strikes after progress", again.Strikes())
			}
		}
		must(t, c.Close())
	}
	must(t, d.End("r"))
	empty(t, d)
}
