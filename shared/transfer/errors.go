package transfer

import (
	"errors"
	"strings"

	"trireme.dev/shared/mem"
)

// ErrVersion is wrapped by Pull's error when the other node speaks another version of the protocol.
var ErrVersion = errors.New("transfer protocol versions differ")

// ErrRemote stands for every error of the other node that has no code of its own.
var ErrRemote = errors.New("other node failed")

// code names an error on the wire. The numbers are those of the HMM's own protocol and never get a new meaning.
type code uint8

var sentinels = []struct {
	code code
	err  error
}{
	{1, mem.ErrGone},
	{2, mem.ErrDenied},
	{3, mem.ErrExhausted},
	{4, mem.ErrCorrupt},
	{6, mem.ErrEnded},
	{7, mem.ErrLost},
	{9, mem.ErrInvalid},
	{10, ErrVersion},
	{255, ErrRemote},
}

func failureFrame(err error) []byte {
	text := err.Error()
	if len(text) > maxText-3 {
		text = strings.ToValidUTF8(text[:maxText-3], "") + "..."
	}
	c := code(255)
	for _, s := range sentinels {
		if errors.Is(err, s.err) {
			c = s.code
			break
		}
	}
	return withTail(head{kind: kindFailure, code: c}, []byte(text))
}

// remoteError is an error of the other node: its text, and the sentinel that its code names.
type remoteError struct {
	sentinel error
	text     string
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.sentinel }

func decodeFailure(c code, text []byte) error {
	e := &remoteError{ErrRemote, strings.ToValidUTF8(string(text), "?")}
	for _, s := range sentinels {
		if s.code == c {
			e.sentinel = s.err
		}
	}
	return e
}
