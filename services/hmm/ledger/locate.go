package ledger

import (
	"fmt"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/wire"
)

// Locate says what of a piece of work's needs lies where, for the instances that could do it. Nothing is held for that, so it may
// be elsewhere a moment later.
func (l *Ledger) Locate(id Conn, q protocol.Locate) (out protocol.Located, err error) {
	c, err := l.stage(id)
	if err != nil {
		return out, fmt.Errorf("locating: %w", err)
	}
	hashes, err := protocol.UnpackKeys(q.Hashes)
	if err != nil {
		return out, fmt.Errorf("locating: %w", err)
	}
	out.Blocks = l.reach(hashes)
	runs := l.runs(hashes)
	for _, b := range l.budgets[1:] {
		if b.owner == nil || b.owner.gone || !wire.HasRole(b.owner.role, q.Role) {
			continue
		}
		s := protocol.Site{Instance: b.owner.instance, NPU: b.npu, Blocks: runs[b.space]}
		for i, name := range q.Objects {
			o, ok := l.objects[name.ID]
			if ok && o.handle.Generation == name.Generation && l.nearest(o, b.space).extent.Space == b.space {
				s.Near = append(s.Near, i)
			}
		}
		if b.owner == c || s.Blocks > 0 || len(s.Near) > 0 {
			out.Sites = append(out.Sites, s)
		}
	}
	return out, nil
}

// Reach is how many of the first hashes are cached on the node, 0 if no instance there has the role.
func (l *Ledger) Reach(role string, hashes []protocol.Key) int {
	for _, c := range l.conns {
		if !c.gone && wire.HasRole(c.role, role) {
			return l.reach(hashes)
		}
	}
	return 0
}

func (l *Ledger) reach(hashes []protocol.Key) (n int) {
	last := 0
	for _, hash := range hashes {
		at, ok := l.block(hash, last, last)
		if !ok {
			break
		}
		last = at.slab.extent.Space
		n++
	}
	return n
}

// runs is how many of the first hashes each space has: the spaces that have some.
func (l *Ledger) runs(hashes []protocol.Key) map[int]int {
	runs := map[int]int{}
	var alive []int
	for space := 1; space < len(l.spaces); space++ {
		alive = append(alive, space)
	}
	for _, hash := range hashes {
		keep := alive[:0]
		for _, space := range alive {
			if _, ok := l.prefix[blockKey{space, hash}]; ok {
				runs[space]++
				keep = append(keep, space)
			}
		}
		if alive = keep; len(alive) == 0 {
			break
		}
	}
	return runs
}
