package hbmbench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
)

// Call is one call of the HMM and its answer, nothing mapped: the claim of a part.
func Call(ctx context.Context, c *hbm.Client) Case {
	return Case{Calls: 1, Close: nothing, Do: func() (time.Duration, error) {
		return timed(func() error { return call(ctx, c, 0) })
	}}
}

func call(ctx context.Context, c *hbm.Client, part int) error {
	_, err := c.Claim(ctx, hbm.Part{Request: "bench", Attempt: 1, Stage: "decode", Part: part, Left: time.Hour}, "bench")
	return err
}

// Calls has so many callers, on the clients by turns, make each of them calls one after the other.
func Calls(ctx context.Context, callers, each int, clients ...*hbm.Client) Case {
	return Case{Calls: callers * each, Close: nothing, Do: func() (time.Duration, error) {
		return timed(func() error {
			errs := make([]error, callers)
			var all sync.WaitGroup
			for i := range callers {
				all.Go(func() {
					for range each {
						if errs[i] = call(ctx, clients[i%len(clients)], i); errs[i] != nil {
							return
						}
					}
				})
			}
			all.Wait()
			return errors.Join(errs...)
		})
	}}
}

// pingBytes is about the size of a call.
const pingBytes = 64

// Ping sends some bytes over a connection whose other end is served by Echo, and has them back: a round trip between two
// processes that think of nothing.
func Ping(conn io.ReadWriter) Case {
	p := make([]byte, pingBytes)
	return Case{Calls: 1, Close: nothing, Do: func() (time.Duration, error) {
		return timed(func() error {
			_, err := conn.Write(p)
			if err == nil {
				_, err = io.ReadFull(conn, p)
			}
			return err
		})
	}}
}

// Echo serves Ping until the other side closes the connection.
func Echo(conn io.ReadWriter) error {
	p := make([]byte, pingBytes)
	for {
		if _, err := io.ReadFull(conn, p); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("echo: %w", err)
		}
		if _, err := conn.Write(p); err != nil {
			return fmt.Errorf("echo: %w", err)
		}
	}
}

// Attach asks the HMM for objects by their handles and maps them, untouched.
func Attach(ctx context.Context, c *hbm.Client, handles []mem.Handle) Case {
	return Case{Extents: len(handles), Bytes: bytesOf(handles), Close: nothing, Do: func() (time.Duration, error) {
		return attach(ctx, c, -1, handles, nil)
	}}
}

func bytesOf(handles []mem.Handle) (n int64) {
	for _, h := range handles {
		n += h.Bytes
	}
	return n
}

// attach maps objects, uses them, and gives them back, which is not timed.
func attach(ctx context.Context, c *hbm.Client, npu int, handles []mem.Handle, use func([]*hbm.Object)) (time.Duration, error) {
	var got []*hbm.Object
	d, err := timed(func() (err error) {
		if got, err = c.Attach(ctx, mem.ReadOnly, npu, handles...); err == nil && use != nil {
			use(got)
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	return d, c.Free(ctx, got...)
}

// HandOver takes an object over by mapping it, booked to NPU 0 and 1 in turns. With touch, the taker reads a byte of each
// page of the machine: what its first pass pays in page faults.
func HandOver(ctx context.Context, taker *hbm.Client, h mem.Handle, touch bool) Case {
	var use func([]*hbm.Object)
	var sum byte
	if touch {
		use = func(got []*hbm.Object) {
			for p, i := got[0].Bytes(), 0; i < len(p); i += 4096 {
				sum += p[i]
			}
		}
	}
	to := 0
	return Case{Extents: 1, Bytes: h.Bytes, Close: nothing, Do: func() (time.Duration, error) {
		to = 1 - to
		return attach(ctx, taker, to, []mem.Handle{h}, use)
	}}
}

// Take takes an object of another memory domain over to an NPU, which copies it, and checks the copy if it is sealed.
func Take(ctx context.Context, taker *hbm.Client, npu int, h mem.Handle) Case {
	return Case{Extents: 1, Bytes: h.Bytes, Close: nothing, Do: func() (time.Duration, error) {
		return attach(ctx, taker, npu, []mem.Handle{h}, nil)
	}}
}

// CopyOver takes an object over by copying it into a new one on the same NPU, which the taker has mapped the old one for.
func CopyOver(ctx context.Context, taker *hbm.Client, h mem.Handle) (Case, error) {
	old, err := taker.Attach(ctx, mem.ReadOnly, -1, h)
	if err != nil {
		return Case{}, err
	}
	return Case{
		Bytes: h.Bytes,
		Close: func() error { return taker.Free(ctx, old...) },
		Do: func() (time.Duration, error) {
			var made []*hbm.Object
			d, err := timed(func() (err error) {
				made, err = taker.Alloc(ctx, hbm.Spec{Kind: mem.KindKV, NPU: int(old[0].Handle().NPU), Bytes: h.Bytes})
				if err == nil {
					copy(made[0].Bytes(), old[0].Bytes())
				}
				return err
			})
			if err != nil {
				return 0, err
			}
			return d, taker.Free(ctx, made...)
		},
	}, nil
}

// CopyMapped copies an object into another that is there and was used before.
func CopyMapped(ctx context.Context, taker *hbm.Client, h mem.Handle) (Case, error) {
	old, err := taker.Attach(ctx, mem.ReadOnly, -1, h)
	if err != nil {
		return Case{}, err
	}
	made, err := taker.Alloc(ctx, hbm.Spec{Kind: mem.KindKV, NPU: int(old[0].Handle().NPU), Bytes: h.Bytes})
	if err != nil {
		return Case{}, errors.Join(err, taker.Free(ctx, old...))
	}
	Fill(made[0].Bytes())
	c := Copy(made[0].Bytes(), old[0].Bytes())
	c.Close = func() error { return taker.Free(ctx, append(old, made...)...) }
	return c, nil
}

// Give allocates n objects of so many bytes on NPU 0 and writes them: what others attach.
func Give(ctx context.Context, giver *hbm.Client, n int, bytes int64) ([]*hbm.Object, error) {
	specs := make([]hbm.Spec, n)
	for i := range specs {
		specs[i] = hbm.Spec{Kind: mem.KindKV, NPU: 0, Bytes: bytes}
	}
	objects, err := giver.Alloc(ctx, specs...)
	if err != nil {
		return nil, err
	}
	for _, o := range objects {
		Fill(o.Bytes())
	}
	return objects, nil
}
