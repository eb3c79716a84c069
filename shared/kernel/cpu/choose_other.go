//go:build !amd64

package cpu

// choose returns the implementation of an instruction set: plain Go is all there is here.
func choose(isa ISA) (vector, error) {
	if isa != Auto && isa != Portable {
		return nil, ErrNotSupported
	}
	return portable{}, nil
}
