package mem

import "errors"

// Errors of the memory plane. The HMM sends them over its socket by code, so errors.Is works in its clients too.
var (
	// ErrGone is returned by attach when the object was freed or its id now names another generation.
	ErrGone = errors.New("object is gone")
	// ErrDenied is returned by attach when the handle's capability does not match, and for what a client's role, or the
	// instance that an NPU is granted to, rules out.
	ErrDenied = errors.New("not for this client")
	// ErrExhausted is returned by alloc when the NPU has no room; the error that wraps it carries the sizes.
	ErrExhausted = errors.New("out of device memory")
	// ErrCorrupt is returned when content does not match its checksum or header.
	ErrCorrupt = errors.New("content does not match its checksum")
	// ErrFenced is returned to a worker whose claim was taken over by a later generation.
	ErrFenced = errors.New("claim was taken over")
	// ErrEnded is returned by alloc and claim for a request that is finished, cancelled or past its deadline, or for an
	// attempt older than the newest.
	ErrEnded = errors.New("request has ended")
	// ErrLost is returned by every call once the connection to the HMM has ended: maps and handles are then useless.
	ErrLost = errors.New("connection to the HMM has ended")
	// ErrSealed is returned when a sealed object is attached for writing.
	ErrSealed = errors.New("object is sealed")
	// ErrInvalid is returned for a request that makes no sense: a negative size, an unknown NPU, a malformed message.
	ErrInvalid = errors.New("invalid request")
	// ErrNotSupported is returned when a backend is opened on a machine without the hardware or the driver that it needs.
	ErrNotSupported = errors.New("not supported on this machine")
)
