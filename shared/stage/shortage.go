package stage

import "sync"

// shortage remembers which requests can take no step for want of memory on this process' NPU.
type shortage struct {
	mu sync.Mutex
	of map[string]int // sequences by request
}

// Short notes that a sequence of a request can take no step for want of memory, or that this is over.
func (s *Stage) Short(request string, short bool) {
	s.short.mu.Lock()
	defer s.short.mu.Unlock()
	if s.short.of == nil {
		s.short.of = make(map[string]int)
	}
	if short {
		s.short.of[request]++
	} else if s.short.of[request]--; s.short.of[request] <= 0 {
		delete(s.short.of, request)
	}
}

// any reports whether some sequence can take no step for want of memory.
func (s *shortage) any() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.of) > 0
}

// othersShort reports whether a sequence of another request can take no step for want of memory.
func (s *Stage) othersShort(request string) bool {
	s.short.mu.Lock()
	defer s.short.mu.Unlock()
	n := len(s.short.of)
	if s.short.of[request] > 0 {
		n--
	}
	return n > 0
}
