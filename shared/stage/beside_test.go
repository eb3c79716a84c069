package stage

import (
	"context"
	"errors"
	"testing"
)

// Weights that would be given up again are not waited for when there is no scratch to compute with them.
func TestBeside(t *testing.T) {
	full, lost := errors.New("no room"), errors.New("lost")
	waits := func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	}
	for name, x := range map[string]struct {
		f    func() error
		g    func(context.Context) error
		want error
	}{
		"both succeed":        {func() error { return nil }, func(context.Context) error { return nil }, nil},
		"the short one fails": {func() error { return full }, waits, full},
		"the long one fails":  {func() error { return nil }, func(context.Context) error { return lost }, lost},
		"both fail":           {func() error { return full }, func(context.Context) error { return lost }, full},
	} {
		if err := beside(t.Context(), x.f, x.g); !errors.Is(err, x.want) {
			t.Errorf("%s: %v, want %v", name, err, x.want)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(lost)
	if err := beside(ctx, func() error { return nil }, waits); err == nil {
		t.Error("nobody has ended the long one")
	}
}
