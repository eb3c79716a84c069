package modelcmd

import "testing"

// TestPixels checks the rule for resized pictures: at most one grey level, on at most one sample in a thousand.
func TestPixels(t *testing.T) {
	const n = 2000
	for _, tt := range []struct {
		name    string
		off     int
		by      float32
		resized bool
		want    bool
	}{
		{"equal", 0, 0, false, true},
		{"rounding", n, 0.5e-5, false, true},
		{"a level, not resized", 1, 2.0 / 255, false, false},
		{"a level, resized", 2, 2.0 / 255, true, true},
		{"a level on too many", 3, 2.0 / 255, true, false},
		{"two levels", 1, 4.0 / 255, true, false},
		{"rounding on all, resized", n, 0.5e-5, true, true},
	} {
		got, want := make([]float32, n), make([]float32, n)
		for i := range tt.off {
			got[i] = tt.by
		}
		var d difference
		d.add(got[:n/2], want[:n/2])
		d.add(got[n/2:], want[n/2:])
		if r := d.pixels(tt.resized); r.OK != tt.want || (r.OffShare != nil) != tt.resized {
			t.Errorf("%s: %+v, want ok %v", tt.name, r, tt.want)
		}
	}
}

func TestFirstDiff(t *testing.T) {
	for _, tt := range []struct {
		a, b []int
		want int
	}{
		{nil, nil, -1}, {[]int{1, 2}, []int{1, 2}, -1}, {[]int{1, 2}, []int{1, 3}, 1}, {[]int{1}, []int{1, 3}, 1}, {[]int{1, 3}, nil, 0},
	} {
		if got := firstDiff(tt.a, tt.b); got != tt.want {
			t.Errorf("firstDiff(%v, %v) = %d, want %d", tt.a, tt.b, got, tt.want)
		}
	}
}
