package openai

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"
)

// Error is an error for a client: an HTTP status and OpenAI's error object.
type Error struct {
	Status     int           // HTTP status
	Message    string        // for humans
	Type       string        // class of error, e.g. invalid_request_error
	Param      string        // parameter at fault, "" when there is none
	Code       string        // for programs, "" when there is none
	RetryAfter time.Duration // not 0: when to come again
}

// The types of error objects.
const (
	TypeInvalid  = "invalid_request_error"
	TypeNotFound = "not_found_error"
	TypeLimit    = "rate_limit_error"
	TypeServer   = "server_error"
)

// Error returns the message.
func (e *Error) Error() string { return e.Message }

// Invalid is a 400 that names the parameter at fault.
func Invalid(param, format string, args ...any) *Error {
	return &Error{Status: http.StatusBadRequest, Type: TypeInvalid, Param: param, Message: fmt.Sprintf(format, args...)}
}

// TooLong is the 400 for a prompt or answer that does not fit the context.
func TooLong(param, format string, args ...any) *Error {
	e := Invalid(param, format, args...)
	e.Code = "context_length_exceeded"
	return e
}

// NoKey is the 401 for a request without an API key.
func NoKey() *Error {
	return unauthorized("This server wants an API key, and the request has none: send it as the header Authorization: Bearer KEY, which OpenAI's clients do " +
		"with their api_key or OPENAI_API_KEY.")
}

// WrongKey is the 401 for a request with an API key of somebody else.
func WrongKey() *Error {
	return unauthorized("The API key is none that this server takes: look for a wrong api_key or OPENAI_API_KEY, and ask the server's operator for a key.")
}

func unauthorized(why string) *Error {
	return &Error{Status: http.StatusUnauthorized, Type: TypeInvalid, Code: "invalid_api_key", Message: why}
}

// UnknownModel is the 404 for a model that is not served.
func UnknownModel(name string) *Error {
	return &Error{Status: http.StatusNotFound, Type: TypeInvalid, Param: "model", Code: "model_not_found",
		Message: fmt.Sprintf("The model %q does not exist here; GET /v1/models lists what does.", name)}
}

// TooLarge is the 413 for a body of more than limit bytes.
func TooLarge(limit int64) *Error {
	return &Error{Status: http.StatusRequestEntityTooLarge, Type: TypeInvalid, Code: "request_too_large",
		Message: fmt.Sprintf("The request body is larger than %d bytes.", limit)}
}

// Overloaded is the 429 for a request that finds no room; the rest says why, in numbers.
func Overloaded(after time.Duration, why string, args ...any) *Error {
	return &Error{Status: http.StatusTooManyRequests, Type: TypeLimit, Code: "overloaded", RetryAfter: after,
		Message: fmt.Sprintf("All capacity is in use: %s. Please try again in %d s.", fmt.Sprintf(why, args...), int(after.Seconds()))}
}

// Server is an error that is not the client's fault.
func Server(status int, format string, args ...any) *Error {
	return &Error{Status: status, Type: TypeServer, Message: fmt.Sprintf(format, args...)}
}

// JSON is the error object: {"error": {"message", "type", "param", "code"}}, the last two null when empty.
func (e *Error) JSON() []byte {
	var body struct {
		Error struct {
			Message string  `json:"message"`
			Type    string  `json:"type"`
			Param   *string `json:"param"`
			Code    *string `json:"code"`
		} `json:"error"`
	}
	body.Error.Message, body.Error.Type = e.Message, e.Type
	if e.Param != "" {
		body.Error.Param = &e.Param
	}
	if e.Code != "" {
		body.Error.Code = &e.Code
	}
	out, err := json.Marshal(&body)
	if err != nil {
		panic("BUG: an error object of strings does not encode: " + err.Error())
	}
	return out
}
