package encoder

import (
	"context"
	"runtime/debug"

	"golang.org/x/sync/semaphore"

	"trireme.dev/shared/imageprep"
)

const (
	// decodeBudget is the memory in bytes that all decodes of an encoder may take together: a picture of the most pixels
	// at 8 bytes each. The few kinds that take more (progressive JPEG, lossless WebP, interlaced PNG of 16 bits, of more
	// than about half of these pixels) are decoded while no other is.
	decodeBudget = 8 * imageprep.DecodeLimit

	// largePicture is the size in bytes of a decode whose memory goes back to the operating system at once. Smaller ones
	// leave it to the next.
	largePicture = 128 << 20
)

// decoder decodes pictures within the budget. It is safe for concurrent use.
type decoder struct {
	prep   imageprep.Config
	budget *semaphore.Weighted // bytes
}

func newDecoder(prep imageprep.Config) *decoder {
	return &decoder{prep: prep, budget: semaphore.NewWeighted(decodeBudget)}
}

// decode is [imageprep.Config.Patches] when there is memory for it. Its error is that of Patches, or ctx's.
func (d *decoder) decode(ctx context.Context, data []byte, pixels []float32) (imageprep.Grid, error) {
	need, err := d.prep.Memory(data)
	if err != nil {
		return imageprep.Grid{}, err
	}
	need = min(need, decodeBudget)
	if err := d.budget.Acquire(ctx, need); err != nil {
		return imageprep.Grid{}, err
	}
	defer d.budget.Release(need)
	if need > largePicture {
		defer debug.FreeOSMemory() // before the release: what comes next finds the memory free
	}
	return d.prep.Patches(data, pixels)
}
