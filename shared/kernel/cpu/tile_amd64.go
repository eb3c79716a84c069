package cpu

// check panics unless the assembly stays inside the slices of t, for the first rows rows of x.
func (t *tile) check(rows int) {
	for r := range rows {
		_, _ = t.x[r][:t.blocks*lanes], t.out[r][:t.tiles*tileOutputs]
	}
	if t.xTail != nil {
		_, _ = t.xTail[:rows*lanes], t.wTail[:tileOutputs*lanes]
	}
	_ = t.w[:(t.tiles*tileOutputs-1)*t.stride+t.blocks*lanes]
}
