package conf

import "testing"

func TestNPUCount(t *testing.T) {
	for _, x := range []struct {
		said      string
		has, want int
	}{
		{"4", 2, 4}, {"+1", 2, 3}, {"-2", 3, 1}, {"64", 1, 64},
		{"-2", 2, 0}, {"0", 2, 0}, {"65", 2, 0}, {"+63", 2, 0}, {"many", 2, 0}, {"", 2, 0}, {"2x", 2, 0}, {"--2", 2, 0},
	} {
		var c NPUCount
		err := c.UnmarshalText([]byte(x.said))
		got := 0
		if err == nil {
			got, err = c.Of(x.has)
		}
		if got != x.want || (err == nil) != (x.want > 0) {
			t.Errorf("%q of %d: %d, %v; want %d", x.said, x.has, got, err, x.want)
		}
	}
}
