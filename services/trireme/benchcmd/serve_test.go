package benchcmd

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"trireme.dev/services/trireme/load"
)

func serve(change func(*Serve)) *Serve {
	c := &Serve{URL: "http://127.0.0.1:1", Model: "m", Requests: 10, Arrivals: "poisson", Words: load.Span{Min: 1, Max: 2}, Output: load.Span{Min: 1, Max: 2}}
	change(c)
	return c
}

func TestLoadsOfFlags(t *testing.T) {
	closed, err := serve(func(*Serve) {}).loads()
	if err != nil || len(closed) != 1 || closed[0].Arrivals != nil || closed[0].Concurrency != 8 {
		t.Errorf("no flags: %+v, %v", closed, err)
	}
	open, err := serve(func(c *Serve) { c.Rate, c.Arrivals = []float64{4, 1, 2}, "gamma:0.5" }).loads()
	if err != nil || len(open) != 3 {
		t.Fatalf("three rates: %d loads, %v", len(open), err)
	}
	var rates []float64
	for _, l := range open {
		rates = append(rates, l.Arrivals.Rate())
	}
	if !slices.Equal(rates, []float64{1, 2, 4}) || open[0].Concurrency != 0 || open[0].Arrivals.String() != "gamma:0.5" {
		t.Errorf("%v %+v", rates, open[0])
	}
}

func TestServeRefuses(t *testing.T) {
	for name, change := range map[string]func(*Serve){
		"no bounds to draw":       func(c *Serve) { c.Plot, c.Rate = "a.svg", []float64{1, 2} },
		"one rate to draw":        func(c *Serve) { c.Plot, c.Rate, c.Goodput = "a.svg", []float64{1}, []string{"ttft:1"} },
		"bad bound":               func(c *Serve) { c.Goodput = []string{"ttft:soon"} },
		"rate beside a file":      func(c *Serve) { c.Arrivals, c.Rate = "file:x", []float64{1} },
		"arrivals without a rate": func(c *Serve) { c.Arrivals = "gamma:2" },
		"negative rate":           func(c *Serve) { c.Rate = []float64{-1} },
		"no requests":             func(c *Serve) { c.Requests = 0 },
		"pictures of no size":     func(c *Serve) { c.Pictures = load.Span{Min: 1, Max: 1} },
		"broken extra field":      func(c *Serve) { c.Extra = []string{"temperature=warm"} },
	} {
		if err := serve(change).Run(Env{Context: t.Context()}); !errors.Is(err, ErrUsage) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Before there is any load it is said why the server does not answer, and what to do.
func TestServeAsksForTheModelFirst(t *testing.T) {
	for status, says := range map[int]string{401: "--api-key", 503: "This server is stopping"} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			_, _ = io.WriteString(w, `{"error":{"message":"This server is stopping."}}`)
		}))
		err := serve(func(c *Serve) { c.URL, c.Model = server.URL, "" }).Run(Env{Context: t.Context(), Out: io.Discard, Err: io.Discard})
		if err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), server.URL) {
			t.Errorf("%d: %v", status, err)
		}
		server.Close()
	}
}
