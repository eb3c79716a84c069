package gateway

import (
	"context"
	"fmt"
	"time"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
)

// DialHMM returns a Dialer that connects to the HMM daemon at socket as instance.
func DialHMM(socket, instance string) Dialer {
	return func(ctx context.Context) (Memory, error) {
		c, err := hbm.Dial(ctx, socket, hbm.Hello{Instance: instance, Role: "gateway"})
		if err != nil {
			return nil, err
		}
		return hmmMemory{c}, nil
	}
}

// hmmMemory is Memory by the HMM's client.
type hmmMemory struct{ *hbm.Client }

// Put implements Memory.
func (m hmmMemory) Put(ctx context.Context, hold Hold, blobs []Blob) ([]mem.Handle, error) {
	ref := hbm.Ref{Request: hold.Request, Attempt: hold.Attempt, Left: hold.Left}
	specs := make([]hbm.Spec, len(blobs))
	for i, b := range blobs {
		specs[i] = hbm.Spec{Kind: b.Kind, NPU: mem.HostNPU, Bytes: int64(len(b.Data)), Ref: ref}
	}
	objs, err := m.Alloc(ctx, specs...)
	if err != nil {
		return nil, err
	}
	for i, o := range objs {
		copy(o.Bytes(), blobs[i].Data)
	}
	handles, err := m.Seal(ctx, ref, objs...)
	// The request holds them now, or nobody shall.
	free, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if ferr := m.Free(free, objs...); err == nil && ferr != nil {
		err = fmt.Errorf("dropping the gateway's own hold: %w", ferr)
	}
	return handles, err
}

// Supersede implements Memory: the HMM drops the holds of older attempts when it hears of a newer one.
func (m hmmMemory) Supersede(ctx context.Context, hold Hold) error {
	return m.Keep(ctx, hbm.Ref{Request: hold.Request, Attempt: hold.Attempt, Left: hold.Left})
}

// Capacity implements Memory.
func (m hmmMemory) Capacity(ctx context.Context) ([]NPUCapacity, error) {
	stats, err := m.Stats(ctx)
	if err != nil {
		return nil, err
	}
	var out []NPUCapacity
	for i := range stats.Memory {
		n := &stats.Memory[i]
		if n.NPU == mem.HostNPU {
			continue
		}
		weights := n.Kinds[mem.KindWeights.String()]
		out = append(out, NPUCapacity{Instance: n.Instance, Bytes: n.Capacity - weights.Used - weights.Padded})
	}
	return out, nil
}
