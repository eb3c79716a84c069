package protocol

import (
	"errors"
	"strings"

	"trireme.dev/shared/mem"
)

// ErrVersion is returned by Dial when the HMM speaks another version of the protocol; the error that wraps it names both.
var ErrVersion = errors.New("HMM protocol versions differ")

// ErrInternal stands for every error of the HMM that has no code of its own.
var ErrInternal = errors.New("HMM failed")

// Code names an error on the socket.
type Code uint8

// The codes. CodeOK is success; numbers are never given a new meaning.
const (
	CodeOK        Code = 0
	CodeGone      Code = 1
	CodeDenied    Code = 2
	CodeExhausted Code = 3
	CodeCorrupt   Code = 4
	CodeFenced    Code = 5
	CodeEnded     Code = 6
	CodeLost      Code = 7
	CodeSealed    Code = 8
	CodeInvalid   Code = 9
	CodeVersion   Code = 10
	CodeInternal  Code = 255
)

var sentinels = []struct {
	code Code
	err  error
}{
	{CodeGone, mem.ErrGone},
	{CodeDenied, mem.ErrDenied},
	{CodeExhausted, mem.ErrExhausted},
	{CodeCorrupt, mem.ErrCorrupt},
	{CodeFenced, mem.ErrFenced},
	{CodeEnded, mem.ErrEnded},
	{CodeLost, mem.ErrLost},
	{CodeSealed, mem.ErrSealed},
	{CodeInvalid, mem.ErrInvalid},
	{CodeVersion, ErrVersion},
	{CodeInternal, ErrInternal},
}

// maxText bounds an error's text: it is for people.
const maxText = 1024

func encodeError(err error) (Code, string) {
	if err == nil {
		return CodeOK, ""
	}
	text := err.Error()
	if len(text) > maxText {
		text = strings.ToValidUTF8(text[:maxText], "") + "..."
	}
	for _, s := range sentinels {
		if errors.Is(err, s.err) {
			return s.code, text
		}
	}
	return CodeInternal, text
}

func decodeError(code Code, text string) error {
	if code == CodeOK {
		return nil
	}
	for _, s := range sentinels {
		if s.code == code {
			return &remoteError{s.err, text}
		}
	}
	return &remoteError{ErrInternal, text}
}

// remoteError is an error of the other side: its text, and the sentinel that its code names.
type remoteError struct {
	sentinel error
	text     string
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.sentinel }
