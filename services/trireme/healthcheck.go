package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// healthcheckCmd asks a service how it is.
type healthcheckCmd struct {
	URL     string        `arg:"" help:"What to ask, such as http://127.0.0.1:9090/health."`
	Timeout time.Duration `help:"Longest wait for the answer." default:"3s"`
}

// Help is shown by `trireme healthcheck --help`.
func (healthcheckCmd) Help() string {
	return `Any other answer, and none within --timeout, is an error with the exit status 1.

Examples:
  trireme healthcheck http://127.0.0.1:8080/health
  trireme healthcheck http://127.0.0.1:9090/health --timeout 1s     a stage that was started with --metrics :9090`
}

// Run returns nil if the answer is 200, and else an error with the first line of what the service says.
func (c *healthcheckCmd) Run(e *env) error {
	ctx, cancel := context.WithTimeout(e.ctx, c.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL, nil)
	if err != nil {
		return fmt.Errorf("%w%w", errUsage, err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		why, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		line, _, _ := strings.Cut(string(why), "\n")
		return fmt.Errorf("%s answers %s: %s", c.URL, resp.Status, line)
	}
	return nil
}
