package encoder

import (
	"bytes"
	"context"
	"errors"
	"image"
	"image/png"
	"testing"

	"trireme.dev/shared/imageprep"
)

// A decode waits for its share of the budget, no longer than its context lets it, and gives it back.
func TestDecodeBudget(t *testing.T) {
	prep := imageprep.Config{PatchSize: 16, TemporalPatchSize: 2, MergeSize: 2, MinPixels: 1 << 10, MaxPixels: 1 << 16,
		Std: [3]float32{1, 1, 1}}
	var picture bytes.Buffer
	if err := png.Encode(&picture, image.NewNRGBA(image.Rect(0, 0, 64, 64))); err != nil {
		t.Fatal(err)
	}
	need, err := prep.Memory(picture.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	grid, err := prep.Grid(64, 64)
	if err != nil {
		t.Fatal(err)
	}
	pixels := make([]float32, grid.Patches()*prep.PatchDim())

	d := newDecoder(prep)
	if !d.budget.TryAcquire(decodeBudget - need + 1) {
		t.Fatal("the budget is not free")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.decode(ctx, picture.Bytes(), pixels); !errors.Is(err, context.Canceled) {
		t.Errorf("a picture was decoded without room for it: %v", err)
	}
	d.budget.Release(1)
	for range 2 {
		if got, err := d.decode(t.Context(), picture.Bytes(), pixels); err != nil || got != grid {
			t.Errorf("%v, %v", got, err)
		}
	}
	if _, err := d.decode(t.Context(), picture.Bytes()[:50], pixels); !errors.Is(err, imageprep.ErrDecode) {
		t.Errorf("half a picture: %v", err)
	}
	d.budget.Release(decodeBudget - need)
	if !d.budget.TryAcquire(decodeBudget) {
		t.Error("a decode kept its share of the budget")
	}
}
