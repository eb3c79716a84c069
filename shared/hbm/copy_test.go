package hbm

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"trireme.dev/shared/mem"
)

// until is a context that ends when it has been looked at so often.
type until struct {
	context.Context
	looks, most int
}

func (u *until) Err() error {
	if u.looks++; u.looks > u.most {
		return mem.ErrEnded
	}
	return nil
}

// A copy whose work ends goes no further than the piece that has begun, of objects and of KV blocks.
func TestCopiesEndWithTheirWork(t *testing.T) {
	src := bytes.Repeat([]byte{1}, 10*copyPiece+100)
	for _, pieces := range []int{0, 3, 10} {
		ctx := &until{Context: t.Context(), most: pieces}
		dst := make([]byte, len(src))
		if _, err := copyBytes(ctx, dst, src, true, nil); err == nil && pieces < 10 {
			t.Fatalf("a copy of %d pieces was finished although its work ended after %d", 11, pieces)
		}
		if n := bytes.Count(dst, []byte{1}); n != pieces*copyPiece {
			t.Errorf("%d bytes were copied, the work ended after %d pieces of %d", n, pieces, copyPiece)
		}
	}
	dst := make([]byte, len(src))
	if crc, err := copyBytes(&until{Context: t.Context(), most: 11}, dst, src, true, nil); err != nil || crc != mem.Checksum(src) || !bytes.Equal(dst, src) {
		t.Errorf("a whole copy: %v", err)
	}

	ctx, cancel := context.WithCancelCause(t.Context())
	to, copier := make([]float32, 2), Copier(ctx)
	if err := copier(to, []float32{1, 2}); err != nil || to[1] != 2 {
		t.Errorf("copied %v, %v", to, err)
	}
	cancel(mem.ErrEnded)
	if err := copier(to, []float32{3, 4}); !errors.Is(err, mem.ErrEnded) || to[0] != 1 {
		t.Errorf("copied %v, %v after the end", to, err)
	}
}
