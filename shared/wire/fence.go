package wire

// Fence is the newest fence that somebody who carries out operations has seen of scalers, of which one acts at a time. It grows with
// each that leads and with each operation (services/scaler/lead). Who compares knows only what it has seen itself: an operation of a
// scaler that does not lead any more, and does not know yet, is refused where its successor has asked before, and begun where it has
// not. Operations of one instance come one after the other all the same, and the successor asks for what was noted under the same id.
// The zero value has seen none. It is not safe for concurrent use.
type Fence uint64

// Refuses reports whether a fence is older than the newest that was seen, and sees it. 0 is an operator's, who is never refused.
func (f *Fence) Refuses(fence uint64) bool {
	if fence != 0 && fence < uint64(*f) {
		return true
	}
	*f = max(*f, Fence(fence))
	return false
}
