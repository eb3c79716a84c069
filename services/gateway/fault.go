package gateway

import (
	"net/http"

	"trireme.dev/services/gateway/openai"
	"trireme.dev/shared/wire"
)

// codeBadPicture is the code of errors about pictures that are no pictures, whoever finds them out.
const codeBadPicture = "invalid_image"

// fault makes the final word of a stage an error for the client. Where the stage blames a picture by its number, the
// error names the picture as the client's request does.
func (j *job) fault(m *wire.Lost) *openai.Error {
	status := m.Status
	if status < 400 || status > 599 {
		status = http.StatusInternalServerError
	}
	if status >= 500 {
		e := openai.Server(status, "%s", m.Why)
		e.Code = m.Code
		return e
	}
	e := openai.Invalid(m.Param, "%s", m.Why)
	e.Status = status
	for i, p := range j.pictures {
		if m.Param == wire.PictureParam(i) {
			e.Param, e.Code = p.param, codeBadPicture
			e.Message = "The picture cannot be used: " + m.Why + "."
			break
		}
	}
	return e
}
