// Package transfer copies objects between nodes: the HMM of the node that has an object serves its bytes from the mapped
// pages, the HMM of the node that wants it pulls them over TCP straight into pages of its own, span by span over several
// connections. PROTOCOL.md says what goes over the wire. The package decides neither what is copied nor who may have it,
// allocates and maps nothing, and is not for hand-over inside a node, which is a mapping (shared/hbm).
package transfer

// Pull, never push; nobody's memory is kept for a taker that went away; and bytes are good only once their checksum is.

// span is a run of bytes of an object: from at up to end.
type span struct{ at, end int64 }
