package hbm

import (
	"context"
	"fmt"
	"slices"

	"trireme.dev/shared/hbm/protocol"
)

// NPUs lists the NPUs granted to this instance: numbers on the node, in the order in which they were granted.
func (c *Client) NPUs() []int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.npus)
}

// Join takes NPUs by number, all or none, for as long as the connection lives or until Part. mem.ErrExhausted, with whoever has it,
// when one is not to be had.
func (c *Client) Join(ctx context.Context, numbers ...int) error {
	_, err := c.join(ctx, protocol.Join{Want: numbers})
	return err
}

// JoinAny takes n more NPUs, those reserved for the instance's name first and then the lowest spare ones, all or none, and returns
// their numbers. mem.ErrExhausted when there are not as many.
func (c *Client) JoinAny(ctx context.Context, n int) ([]int, error) {
	return c.join(ctx, protocol.Join{NPUs: n})
}

func (c *Client) join(ctx context.Context, j protocol.Join) ([]int, error) {
	var npus []int
	if err := c.acquire(ctx, protocol.OpJoin, j, &npus, func() {
		_ = c.call(context.Background(), protocol.OpPart, protocol.Parting{NPUs: npus}, nil)
	}); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.npus = append(c.npus, npus...)
	return npus, nil
}

// Part gives NPUs up, all or none: they are spare from then on. mem.ErrInvalid, which says what it is, when this connection holds
// something there that no request and no cache keeps: memory booked to the NPU, or weights in a domain where no NPU is left to it.
func (c *Client) Part(ctx context.Context, numbers ...int) error {
	return c.PartFor(ctx, "", numbers...)
}

// PartFor is Part for NPUs that an instance of a name is to have next: they stay reserved for it as if it had ended. "": for nobody.
func (c *Client) PartFor(ctx context.Context, name string, numbers ...int) error {
	if err := c.call(ctx, protocol.OpPart, protocol.Parting{NPUs: numbers, For: name}, nil); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.npus = slices.DeleteFunc(c.npus, func(n int) bool { return slices.Contains(numbers, n) })
	return nil
}

// Use is how much device memory this connection has in use, in bytes of whole pages: what is booked to its NPUs, but for what only a cache keeps, and the
// weights that it holds in their memory domains; and the most since it connected, or since again was last true.
func (c *Client) Use(ctx context.Context, again bool) (now, most int64, err error) {
	var u protocol.Use
	if err := c.call(ctx, protocol.OpUse, again, &u); err != nil {
		return 0, 0, fmt.Errorf("asking how much memory is in use: %w", err)
	}
	return u.Now, u.Most, nil
}
