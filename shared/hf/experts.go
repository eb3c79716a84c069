package hf

import (
	"fmt"
	"slices"
	"strconv"

	"trireme.dev/shared/model"
)

// experts returns the routed experts of one layer, whose tensors begin with prefix.
func (b *builder) experts(prefix string) []model.Expert {
	t := &b.folder.Config.Text
	if b.has(prefix+"gate_up_proj") || b.has(prefix+"down_proj") {
		return b.fusedExperts(prefix)
	}
	out := make([]model.Expert, t.Experts)
	for e := range out {
		b.expert(e, func() { out[e] = b.gated(prefix+strconv.Itoa(e)+".", t.ExpertHidden) })
	}
	return out
}

// expert has f build expert e of the layer, in an object of its own. One that is not wanted has a number, but stays empty.
func (b *builder) expert(e int, f func()) {
	b.object()
	b.apart, b.number = b.pack, e
	if b.wanted == nil || b.wanted(b.at, e) {
		f()
	} else {
		b.skip()
	}
	b.apart, b.number = false, -1
	b.object()
}

// fusedExperts returns the experts of a layer that lie in two tensors, gate_up_proj and down_proj. With E experts of
// width I over a residual stream of width H, transformers 5 has rows of outputs, [E, 2I, H] and [E, H, I], which can
// be used as they are; transformers 4 has rows of inputs, [E, H, 2I] and [E, I, H], which are transposed. In both the
// gate's half comes before the up projection's (modeling_qwen3_vl_moe.py, Qwen3VLMoeTextExperts).
func (b *builder) fusedExperts(prefix string) []model.Expert {
	t := &b.folder.Config.Text
	nameGU, nameDown := prefix+"gate_up_proj", prefix+"down_proj"
	transposed := false
	if file := b.folder.index[nameDown]; file != nil {
		var err error
		if transposed, err = isTransposed(file.tensors[nameDown].Shape, t, b.folder.version); err != nil {
			b.fail(nameDown, err)
		}
	}
	var gu, down Tensor
	if transposed {
		gu = b.tensor(nameGU, t.Experts, t.Hidden, 2*t.ExpertHidden)
		down = b.tensor(nameDown, t.Experts, t.ExpertHidden, t.Hidden)
	} else {
		gu = b.tensor(nameGU, t.Experts, 2*t.ExpertHidden, t.Hidden)
		down = b.tensor(nameDown, t.Experts, t.Hidden, t.ExpertHidden)
	}
	if b.err != nil {
		return nil
	}
	out := make([]model.Expert, t.Experts)
	for e := range out {
		guPart, downPart := gu.part(e, t.Experts), down.part(e, t.Experts)
		b.expert(e, func() {
			if transposed {
				out[e] = b.transposedExpert(nameGU, guPart, nameDown, downPart)
				return
			}
			both := b.matrixOf(nameGU, guPart, 2*t.ExpertHidden, t.Hidden)
			if both.Data != nil { // not while planning
				out[e].Gate = both.Rowspan(0, t.ExpertHidden)
				out[e].Up = both.Rowspan(t.ExpertHidden, 2*t.ExpertHidden)
			}
			out[e].Down = b.matrixOf(nameDown, downPart, t.Hidden, t.ExpertHidden)
		})
	}
	return out
}

// isTransposed says whether experts whose down_proj has that shape lie as in transformers 4. The shape of
// gate_up_proj would not do: it is the same in both where 2I = H. Where I = H, down_proj is the same too and the
// version that wrote the folder decides.
func isTransposed(down []int, t *model.Text, version int) (bool, error) {
	rows := slices.Equal(down, []int{t.Experts, t.Hidden, t.ExpertHidden})
	inputs := slices.Equal(down, []int{t.Experts, t.ExpertHidden, t.Hidden})
	switch {
	case rows && inputs && version == 0:
		return false, fmt.Errorf("experts as wide as the model need a transformers_version in config.json "+
			"to tell how they lie: %w", ErrUnsupported)
	case rows && inputs:
		return version < 5, nil
	case rows, inputs:
		return inputs, nil
	}
	return false, fmt.Errorf("its shape is %v, but config.json asks for [%d %d %d] or its transpose: %w",
		down, t.Experts, t.Hidden, t.ExpertHidden, ErrConfig)
}

// transposedExpert returns one expert whose matrices lie as in transformers 4: gu is [H, 2I], down [I, H].
func (b *builder) transposedExpert(nameGU string, gu Tensor, nameDown string, downT Tensor) model.Expert {
	h, i := b.folder.Config.Text.Hidden, b.folder.Config.Text.ExpertHidden
	gate, up, down := b.alloc(h*i), b.alloc(h*i), b.alloc(h*i)
	x := func(data memory) model.Expert {
		return model.Expert{
			Gate: model.Matrix{Data: data(gate), Rows: i, Cols: h},
			Up:   model.Matrix{Data: data(up), Rows: i, Cols: h},
			Down: model.Matrix{Data: data(down), Rows: h, Cols: i},
		}
	}
	if !b.planning {
		return x(b.data)
	}
	b.later(nameGU, gu, func(data memory) error {
		src, err := bf16s(gu)
		if err != nil {
			return err
		}
		transpose(x(data).Gate, src, 2*i)
		transpose(x(data).Up, src[i:], 2*i)
		return nil
	})
	b.later(nameDown, downT, func(data memory) error {
		src, err := bf16s(downT)
		if err != nil {
			return err
		}
		transpose(x(data).Down, src, h)
		return nil
	})
	return x(b.data)
}

// part returns the i-th of n equal parts of t along its first axis.
func (t Tensor) part(i, n int) Tensor {
	size := len(t.Data) / n
	return Tensor{DType: t.DType, Shape: t.Shape[1:], Data: t.Data[i*size : (i+1)*size : (i+1)*size]}
}

// bf16s returns the elements of t: a view, or a copy where they must be converted or are not aligned.
func bf16s(t Tensor) ([]model.BF16, error) {
	if t.DType == "BF16" {
		if view, ok := viewBF16(t); ok {
			return view, nil
		}
	}
	out := make([]model.BF16, t.Len())
	return out, narrow(out, t)
}

// transpose writes dst[r][c] = src[c*stride+r]. It goes by tiles: a cache line of each of a few source rows, few
// because rows of a real model lie a multiple of 1 KiB apart and so compete for the same sets of the cache.
func transpose(dst model.Matrix, src []model.BF16, stride int) {
	const tileRows, tileCols = 32, 16
	for c0 := 0; c0 < dst.Cols; c0 += tileCols {
		c1 := min(c0+tileCols, dst.Cols)
		for r0 := 0; r0 < dst.Rows; r0 += tileRows {
			for r := r0; r < min(r0+tileRows, dst.Rows); r++ {
				row := dst.Data[r*dst.Cols+c0 : r*dst.Cols+c1]
				at := c0*stride + r
				for c := range row {
					row[c] = src[at]
					at += stride
				}
			}
		}
	}
}
