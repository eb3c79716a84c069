package hbm

import (
	"context"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

// Located says where a piece of work would find what it needs.
type Located = protocol.Located

// Site is an NPU of an instance, by what lies in its memory domain.
type Site = protocol.Site

// Domains is the number of memory domains of the node; of a gateway, 0.
func (c *Client) Domains() int { return len(c.maps.spaces) - 1 }

// Locate asks what lies where for the instances of the node that have a role: of a prompt's blocks, by their keys, of which at
// most the first protocol.MaxBlocks are looked at; and of objects, at most protocol.MaxBatch. Nothing is held for
// that, so it may be elsewhere a moment later. Objects of other nodes lie nowhere here.
func (c *Client) Locate(ctx context.Context, role string, keys []Key, objects ...mem.Handle) (l Located, err error) {
	q := protocol.Locate{Role: role, Hashes: protocol.PackKeys(keys[:min(len(keys), protocol.MaxBlocks)])}
	for _, h := range objects[:min(len(objects), protocol.MaxBatch)] {
		name := nameOf(h)
		if h.Node != c.node {
			name = protocol.Object{}
		}
		q.Objects = append(q.Objects, name)
	}
	err = c.call(ctx, protocol.OpLocate, q, &l)
	return l, err
}
