package elastic

import (
	"slices"

	"trireme.dev/shared/sched/placement"
)

// Recent is the load of an instance's experts lately. What was counted fades: of each part the next ones leave seven eighths, so
// that with parts of ten seconds half of what counts is of the last minute of work. Parts without work do not count.
type Recent struct {
	total placement.Load // of all parts
	load  placement.Load
}

// Add takes note of a part: total is the load since the instance began, [layers][experts], which belongs to Recent from now on.
func (r *Recent) Add(total placement.Load) {
	if r.load == nil {
		r.load = make(placement.Load, len(total))
		r.total = make(placement.Load, len(total))
		for l := range total {
			r.load[l], r.total[l] = make([]uint64, len(total[l])), make([]uint64, len(total[l]))
		}
	}
	if rows(total) == rows(r.total) {
		return
	}
	for l := range total {
		for e, n := range total[l] {
			r.load[l][e] = r.load[l][e]*7/8 + n - r.total[l][e]
		}
	}
	r.total = total
}

// Load is the load lately, and how many rows it is of; nil when there was none. It belongs to the caller. total is as Add's: what has come
// since the last part counts, but ends none, so that nothing fades because somebody asks; nil: it is not known.
func (r *Recent) Load(total placement.Load) (placement.Load, uint64) {
	if r.load == nil && total == nil || rows(r.load)+rows(total) == 0 {
		return nil, 0
	}
	load := make(placement.Load, max(len(r.load), len(total)))
	for l := range load {
		if r.load == nil {
			load[l] = slices.Clone(total[l])
			continue
		}
		load[l] = slices.Clone(r.load[l])
		for e := range load[l] {
			if total != nil {
				load[l][e] += total[l][e] - r.total[l][e]
			}
		}
	}
	return load, rows(load)
}

func rows(load placement.Load) (sum uint64) {
	for _, layer := range load {
		for _, n := range layer {
			sum += n
		}
	}
	return sum
}

// Slots is the most experts of a layer that an NPU gets: its part of them, and of the places that these need so many more, spare
// as a part of them, for second copies.
func Slots(layout placement.Layout, npus int, spare float64) int {
	most := 0
	for _, layer := range layout {
		most = max(most, len(layer))
	}
	part := (most + npus - 1) / npus
	return min(most, int(float64(part)*(1+spare)+0.999))
}
