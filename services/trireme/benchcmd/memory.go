package benchcmd

import (
	"errors"
	"fmt"

	"trireme.dev/shared/conf"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hbm/hbmbench"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/host"
)

// row is one measurement to make.
type row struct {
	name    string
	against string // name of the row before it that it is compared with; "" for those that others are compared with
	open    func() (hbmbench.Case, error)
}

const (
	manyExtents = 1000
	callers     = 200
	callsEach   = 20
	freshBytes  = 64 << 20
	crcBytes    = 256 << 20
)

// sizes are those of the objects that are handed over, up to the largest.
func (c *Memory) sizes() []int64 {
	var s []int64
	for _, n := range []int64{1 << 20, 16 << 20, 256 << 20} {
		if n < int64(c.Largest) {
			s = append(s, n)
		}
	}
	return append(s, int64(c.Largest)/hbmbench.Page*hbmbench.Page)
}

// measure makes all rows.
func (c *Memory) measure(e Env) (r *Report, err error) {
	sizes := c.sizes()
	room, _, err := host.Free()
	if err != nil {
		return nil, err
	}
	r = newReport()
	for len(sizes) > 1 && 3*sizes[len(sizes)-1] > room/10*9 {
		last := len(sizes) - 1
		r.LeftOut = append(r.LeftOut, fmt.Sprintf("%v: that takes %v of memory, %v are free",
			conf.Bytes(sizes[last]), conf.Bytes(3*sizes[last]), conf.Bytes(room)))
		sizes = sizes[:last]
	}
	var l *lab
	return r, onThread(func() (err error) {
		l, err = open(e.Context, max(2*sizes[len(sizes)-1], manyExtents*hbmbench.Page))
		return err
	}, func() (err error) {
		defer func() { err = errors.Join(err, l.close()) }()
		rows := l.rows(sizes)
		next, end := progress(e.Err, len(rows))
		defer end()
		for _, w := range rows {
			next(w.name)
			if err := c.add(l, r, w); err != nil {
				return fmt.Errorf("measuring %s: %w", w.name, l.because(err))
			}
		}
		return l.empty()
	})
}

// add makes one row.
func (c *Memory) add(l *lab, r *Report, w row) error {
	made, err := w.open()
	if err != nil {
		return err
	}
	samples, err := hbmbench.Measure(l.ctx, made, c.Time)
	if err != nil {
		return err
	}
	return r.add(w, made, samples)
}

// rows is the plan: cases open when their turn comes.
func (l *lab) rows(sizes []int64) []row {
	ready := func(make func() hbmbench.Case) func() (hbmbench.Case, error) {
		return func() (hbmbench.Case, error) { return make(), nil }
	}
	const ping, call = "ping between two processes", "call of the HMM"
	rows := []row{
		{ping, "", ready(func() hbmbench.Case { return hbmbench.Ping(l.echo) })},
		{call, ping, ready(func() hbmbench.Case { return hbmbench.Call(l.ctx, l.taker) })},
		{fmt.Sprintf("call, %d callers", callers), call, ready(func() hbmbench.Case {
			return hbmbench.Calls(l.ctx, callers, callsEach, l.taker)
		})},
	}
	for _, n := range []int{1, manyExtents} {
		what := fmt.Sprintf("%d extents", n)
		if n == 1 {
			what = "an extent"
		}
		memcpy, mapping := memcpyOf(int64(n)*hbmbench.Page), "map "+what
		rows = append(rows,
			row{memcpy, "", func() (hbmbench.Case, error) { return hbmbench.Memcpy(int64(n) * hbmbench.Page) }},
			row{mapping, memcpy, func() (hbmbench.Case, error) { return hbmbench.Map(n) }},
			row{"remap " + what, mapping, func() (hbmbench.Case, error) { return hbmbench.Remap(n) }},
			row{"attach " + what, mapping, func() (hbmbench.Case, error) {
				handles, err := l.order(n, hbmbench.Page)
				return hbmbench.Attach(l.ctx, l.taker, handles), err
			}},
		)
	}
	for _, size := range sizes {
		memcpy, of := memcpyOf(size), conf.Bytes(size).String()
		one := func(make func(h mem.Handle) (hbmbench.Case, error)) func() (hbmbench.Case, error) {
			return func() (hbmbench.Case, error) {
				handles, err := l.order(1, size)
				if err != nil {
					return hbmbench.Case{}, err
				}
				return make(handles[0])
			}
		}
		over := func(touch bool) func() (hbmbench.Case, error) {
			return one(func(h mem.Handle) (hbmbench.Case, error) { return hbmbench.HandOver(l.ctx, l.taker, h, touch), nil })
		}
		rows = append(rows,
			row{memcpy, "", func() (hbmbench.Case, error) { return hbmbench.Memcpy(size) }},
			row{"hand over " + of + " by map", memcpy, over(false)},
			row{"  and touch every page", memcpy, over(true)},
			row{"hand over " + of + " by copy", memcpy, one(func(h mem.Handle) (hbmbench.Case, error) {
				return hbmbench.CopyOver(l.ctx, l.taker, h)
			})},
			row{"copy " + of + " between maps", memcpy, one(func(h mem.Handle) (hbmbench.Case, error) {
				return hbmbench.CopyMapped(l.ctx, l.taker, h)
			})},
		)
	}
	size := sizes[0] // the largest that is measured already and not above crcBytes
	for _, n := range sizes {
		if n <= crcBytes {
			size = n
		}
	}
	fresh := "back and touch " + conf.Bytes(freshBytes).String() + " of fresh memory"
	return append(rows,
		row{"checksum of " + conf.Bytes(size).String(), memcpyOf(size), func() (hbmbench.Case, error) { return l.checksum(size) }},
		row{fresh, "", func() (hbmbench.Case, error) { return hbmbench.Back(freshBytes, hbmbench.Fresh) }},
		row{"  of memory used before", fresh, func() (hbmbench.Case, error) { return hbmbench.Back(freshBytes, hbmbench.Reused) }},
		row{"  of memory made ready", fresh, func() (hbmbench.Case, error) { return hbmbench.Back(freshBytes, hbmbench.Readied) }},
	)
}

func memcpyOf(bytes int64) string { return "memcpy of " + conf.Bytes(bytes).String() }

// checksum is that of an object of another process.
func (l *lab) checksum(size int64) (hbmbench.Case, error) {
	handles, err := l.order(1, size)
	if err != nil {
		return hbmbench.Case{}, err
	}
	got, err := l.taker.Attach(l.ctx, mem.ReadOnly, -1, handles...)
	if err != nil {
		return hbmbench.Case{}, err
	}
	c := hbmbench.Checksum(got[0].Bytes())
	c.Close = func() error { return l.taker.Free(l.ctx, got...) }
	return c, nil
}

// empty checks that the HMM has everything back.
func (l *lab) empty() error {
	if _, err := l.order(0, 0); err != nil {
		return err
	}
	s, err := l.taker.Stats(l.ctx)
	if err != nil {
		return err
	}
	used := hbm.Usage{}
	for _, m := range s.Memory {
		used.Used += m.Used
		used.Padded += m.Padded
	}
	if s.Objects != 0 || used.Used+used.Padded != 0 {
		return fmt.Errorf("BUG: %d objects and %d bytes are left in the HMM", s.Objects, used.Used+used.Padded)
	}
	return nil
}
