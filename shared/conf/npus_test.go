package conf

import "testing"

func TestNPUCount(t *testing.T) {
	for _, x := range []struct {
		said      string
		has, want int
	}{
		{"4", 2, 4}, {"+1", 2, 3}, {"-2", 3, 1}, {"64", 1, 64}, {"-2", 2, 0}, {"0", 2, 0}, {"1", 0, 1}, {"0", 0, 0},
		{"-3", 2, -1}, {"65", 2, -1}, {"+63", 2, -1}, {"many", 2, -1}, {"", 2, -1}, {"2x", 2, -1}, {"--2", 2, -1},
	} {
		var c NPUCount
		err := c.UnmarshalText([]byte(x.said))
		got := -1
		if err == nil {
			got, err = c.Of(x.has)
		}
		if err != nil {
			got = -1
		}
		if got != x.want {
			t.Errorf("%q of %d: %d, %v; want %d", x.said, x.has, got, err, x.want)
		}
	}
}
