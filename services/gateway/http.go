package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/labstack/echo/v4/middleware"

	"trireme.dev/services/gateway/openai"
	"trireme.dev/shared/bus"
)

// statusClientGone is what logs and metrics call the end of a request whose client left (nginx's number).
const statusClientGone = 499

// errClient is wrapped by errors of writing to a client.
var errClient = errors.New("the client is gone or does not read")

// routes sets up the API.
func (g *Gateway) routes() {
	e := echo.New()
	e.HideBanner, e.HidePort = true, true
	e.HTTPErrorHandler = g.fail
	e.Use(middleware.RequestID())
	e.Use(middleware.RecoverWithConfig(middleware.RecoverConfig{
		LogErrorFunc: func(c echo.Context, err error, stack []byte) error {
			g.log.Error("a handler panicked", "path", c.Path(), "error", err, "stack", string(stack))
			return err
		},
	}))
	if len(g.cfg.Origins) > 0 {
		e.Use(cors(g.cfg.Origins))
	}
	if len(g.cfg.Keys) > 0 {
		e.Use(keyed(g.cfg.Keys))
	}
	limit := middleware.BodyLimit(strconv.FormatInt(g.cfg.MaxBody, 10) + "B")
	e.POST("/v1/chat/completions", g.chatCompletions, g.guard, limit)
	e.POST("/v1/completions", g.completions, g.guard, limit)
	e.GET("/v1/models", g.models)
	e.GET("/v1/models/:model", g.oneModel)
	for _, method := range []string{http.MethodGet, http.MethodHead} { // net/http drops the body of an answer to HEAD
		e.Add(method, "/health", g.health)
		e.Add(method, "/live", g.live)
	}
	e.GET("/metrics", echo.WrapHandler(g.metrics.handler()))
	g.echo = e
}

// fail answers a request whose handler returned an error before anything was written.
func (g *Gateway) fail(err error, c echo.Context) {
	status := statusClientGone
	e := g.toError(err)
	if web := (*echo.HTTPError)(nil); errors.As(err, &web) {
		sayWhere(e, c)
	}
	if e != nil {
		status = e.Status
	}
	if strings.HasPrefix(c.Path(), "/v1/") && c.Request().Method == http.MethodPost {
		g.metrics.failed.WithLabelValues(strconv.Itoa(status)).Inc()
	}
	if e == nil || c.Response().Committed {
		return
	}
	if status >= 500 {
		g.log.Warn("request failed", "path", c.Path(), "status", status, "error", err)
	}
	if e.RetryAfter > 0 {
		c.Response().Header().Set("Retry-After", strconv.Itoa(int(e.RetryAfter.Seconds())))
	}
	said := e.JSON()
	left := unread(status, c)
	if left { // the answer is whole when it is flushed, before the rest of the body has come
		c.Response().Header().Set("Connection", "close")
		c.Response().Header().Set("Content-Length", strconv.Itoa(len(said)))
	}
	w := http.NewResponseController(c.Response())
	_ = w.SetWriteDeadline(time.Now().Add(g.cfg.WriteWait))
	if err := c.JSONBlob(status, said); err != nil {
		return
	}
	if left {
		_ = w.Flush()
		g.drain(c.Request(), w)
	}
}

// bodyTaken is set in the context of a request whose body somebody has begun to read.
const bodyTaken = "body taken"

// unread reports whether a body may not have been read when a request is answered with an error of this status: a path, method, key or
// encoding that is wrong is told before.
func unread(status int, c echo.Context) bool {
	return status == http.StatusRequestEntityTooLarge || c.Request().ContentLength != 0 && c.Get(bodyTaken) == nil
}

// sayWhere says what there is instead of a path or a method that there is not.
func sayWhere(e *openai.Error, c echo.Context) {
	r := c.Request()
	path := r.URL.EscapedPath()
	if len(path) > 100 {
		path = path[:100] + "…"
	}
	switch e.Status {
	case http.StatusNotFound:
		there := "there are /v1/chat/completions, /v1/completions and /v1/models"
		if !strings.HasPrefix(path, "/v1/") {
			there = "paths of the API begin with /v1, as /v1/chat/completions"
		}
		e.Message = fmt.Sprintf("There is nothing at %s %s; %s.", r.Method, path, there)
	case http.StatusMethodNotAllowed:
		var others []string
		for m := range strings.SplitSeq(c.Response().Header().Get("Allow"), ", ") {
			if m != http.MethodOptions {
				others = append(others, m)
			}
		}
		e.Message = fmt.Sprintf("%s is not taken at %s; %s is.", r.Method, path, strings.Join(others, " or "))
	}
}

// drain reads some of a body that nobody wants, and keeps none of it, so that clients which send all of it before they read see the answer and
// no broken connection.
func (g *Gateway) drain(r *http.Request, w *http.ResponseController) {
	if r.Header.Get("Expect") != "" {
		return // the client asked first and has sent nothing
	}
	_ = w.SetReadDeadline(time.Now().Add(g.cfg.WriteWait))
	_, _ = io.CopyN(io.Discard, r.Body, 2*g.cfg.MaxBody)
}

// storeRetry is when to come again after NATS has stored nothing. An operator has to look, most likely.
const storeRetry = 10 * time.Second

// toError makes an error of any kind one for a client; nil when the client is gone.
func (g *Gateway) toError(err error) *openai.Error {
	var api *openai.Error
	var web *echo.HTTPError
	switch {
	case errors.As(err, &api):
		return api
	case errors.Is(err, errDeadline):
		return openai.Server(http.StatusGatewayTimeout, "The request was not finished within %v.", g.cfg.Deadline)
	case errors.Is(err, bus.ErrNoStore):
		g.log.Error("a request is refused; is NATS' disk full, or a server of its cluster missing?", "error", err)
		e := openai.Server(http.StatusServiceUnavailable, "The queues take no messages at the moment; please try again in %d s.",
			int(storeRetry.Seconds()))
		e.RetryAfter = storeRetry
		return e
	case errors.Is(err, errStopping):
		return openai.Server(http.StatusServiceUnavailable, "This server is stopping; please try again.")
	case errors.Is(err, errClient), errors.Is(err, context.Canceled):
		return nil
	case errors.As(err, &web):
		if web.Code == http.StatusRequestEntityTooLarge {
			return openai.TooLarge(g.cfg.MaxBody)
		}
		e := &openai.Error{Status: web.Code, Type: openai.TypeInvalid, Message: fmt.Sprintf("%v.", web.Message)}
		switch {
		case web.Code >= 500:
			e.Type = openai.TypeServer
		}
		return e
	}
	g.log.Error("internal error", "error", err)
	return openai.Server(http.StatusInternalServerError, "Internal error: %v.", err)
}

// body reads a request's body. echo's middleware bounds its length.
func (g *Gateway) body(c echo.Context) ([]byte, error) {
	if how := c.Request().Header.Get("Content-Encoding"); how != "" && !strings.EqualFold(how, "identity") {
		e := openai.Invalid("", "A body with Content-Encoding %.20s is not taken; send it as it is.", how)
		e.Status = http.StatusUnsupportedMediaType
		return nil, e
	}
	c.Set(bodyTaken, true)
	w := http.NewResponseController(c.Response())
	_ = w.SetReadDeadline(time.Now().Add(g.cfg.BodyWait))
	data, err := io.ReadAll(c.Request().Body)
	_ = w.SetReadDeadline(time.Time{})
	var web *echo.HTTPError
	switch {
	case errors.As(err, &web):
		return nil, err
	case err != nil && c.Request().Context().Err() != nil:
		return nil, errClient
	case err != nil:
		return nil, openai.Invalid("", "The body could not be read: %v.", err)
	}
	return data, nil
}

// requestContext is the life of an HTTP request: it ends when the client leaves, the gateway stops, or the deadline
// passes.
func (g *Gateway) requestContext(c echo.Context, began time.Time) (context.Context, time.Time, context.CancelFunc) {
	deadline := began.Add(g.cfg.Deadline)
	ctx, cancel := context.WithDeadlineCause(c.Request().Context(), deadline, errDeadline)
	return ctx, deadline, cancel
}

// checkModel checks the model that a request names; naming none means the one that there is.
func (g *Gateway) checkModel(name string) error {
	if name != "" && name != g.name {
		return openai.UnknownModel(name)
	}
	return nil
}

func (g *Gateway) modelObject() openai.Model {
	return openai.Model{ID: g.name, Object: "model", Created: g.created, OwnedBy: "trireme", MaxModelLen: g.model.Config.Text.Context,
		Paced: strings.Join(g.paced(), ", ")}
}

func (g *Gateway) models(c echo.Context) error {
	return c.JSON(http.StatusOK, &openai.Models{Object: "list", Data: []openai.Model{g.modelObject()}})
}

func (g *Gateway) oneModel(c echo.Context) error {
	name := c.Param("model") // as the path has it: %2F stands for a slash
	if plain, err := url.PathUnescape(name); err == nil {
		name = plain
	}
	if err := g.checkModel(name); err != nil {
		return err
	}
	m := g.modelObject()
	return c.JSON(http.StatusOK, &m)
}
