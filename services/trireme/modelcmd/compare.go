package modelcmd

import (
	"math"
)

// The tolerances of the project, absolute, against transformers on a CPU in float32.
const (
	tensorTolerance = 5e-4      // embeddings, DeepStack features, router logits, logits
	pixelTolerance  = 1e-5      // pixel values of a picture that is not resized
	greyTolerance   = 2.0 / 255 // one grey level of a resized picture, whose samples lie in [-1, 1] ...
	greyShare       = 1e-3      // ... on at most this share of them
	printTolerance  = 5e-6      // rounding of numbers printed with five decimals
)

// TensorReport says how far a tensor lies from the reference.
type TensorReport struct {
	Name      string  `json:"name"`
	MaxDiff   float64 `json:"max_diff"`  // largest absolute difference; the largest float64 where one is not a number
	Tolerance float64 `json:"tolerance"` // what MaxDiff may be
	// OffShare is the share of samples beyond 1e-5, of the pixel values of resized pictures; at most 0.001 is right.
	OffShare *float64 `json:"off_share,omitempty"`
	OK       bool     `json:"ok"`
	Problem  string   `json:"problem,omitempty"` // why the tensor could not be compared
}

// difference collects the difference of two tensors, which may come in pieces.
type difference struct {
	largest float64
	off     int // samples beyond pixelTolerance
	total   int
}

// add compares got with as many values of want.
func (d *difference) add(got, want []float32) {
	for i, g := range got {
		x := math.Abs(float64(g) - float64(want[i]))
		if math.IsNaN(x) || math.IsInf(x, 0) {
			x = math.MaxFloat64
		}
		d.largest = max(d.largest, x)
		if x > pixelTolerance {
			d.off++
		}
	}
	d.total += len(got)
}

// report judges the difference by a tolerance.
func (d *difference) report(name string, tolerance float64) TensorReport {
	return TensorReport{Name: name, MaxDiff: d.largest, Tolerance: tolerance, OK: d.largest <= tolerance}
}

// pixels judges the difference of the pixel values of a case, any of whose pictures was resized or none.
func (d *difference) pixels(resized bool) TensorReport {
	if !resized {
		return d.report("pixel_values", pixelTolerance)
	}
	share := float64(d.off) / float64(max(d.total, 1))
	r := d.report("pixel_values", greyTolerance+pixelTolerance)
	r.OffShare = &share
	r.OK = r.OK && share <= greyShare
	return r
}

// firstDiff returns the first index at which a and b differ, a missing element included, or -1.
func firstDiff[T comparable](a, b []T) int {
	for i := range max(len(a), len(b)) {
		if i >= len(a) || i >= len(b) || a[i] != b[i] {
			return i
		}
	}
	return -1
}
