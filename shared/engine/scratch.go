package engine

import "trireme.dev/shared/kernel"

// scratch is device memory of an NPU that is given back together.
type scratch struct {
	c   kernel.Compute
	all [][]float32
	err error // the first one of alloc; what it returns then is of no use
}

// alloc returns zeroed memory of n float32.
func (s *scratch) alloc(n int) []float32 {
	if s.err != nil {
		return nil
	}
	x, err := s.c.Alloc(n)
	if err != nil {
		s.err = err
		return nil
	}
	s.all = append(s.all, x)
	return x
}

// free gives all of it back. Nothing computes with it any more.
func (s *scratch) free() {
	for _, x := range s.all {
		s.c.Free(x)
	}
	s.all = nil
}
