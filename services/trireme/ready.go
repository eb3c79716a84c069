package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"

	"trireme.dev/shared/wire"
)

// patience is how long up waits for health before it says what is missing, each time again.
const patience = 10 * time.Second

// waitHealthy polls /health until it is 200. What it names as missing is told from time to time.
func waitHealthy(ctx context.Context, address string, w io.Writer) error {
	if u, err := url.Parse(address); err == nil { // a wildcard address is asked through loopback
		if ip := net.ParseIP(u.Hostname()); ip != nil && ip.IsUnspecified() {
			address = "http://" + net.JoinHostPort("127.0.0.1", u.Port())
		}
	}
	client := http.Client{Timeout: 2 * time.Second}
	for told := time.Now(); ; {
		status, said, err := health(ctx, &client, address)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil && status == http.StatusOK:
			return nil
		case time.Since(told) >= patience:
			told = time.Now()
			if errors.Is(err, syscall.ECONNREFUSED) {
				said = "for the gateway, which does not listen yet"
			} else if err != nil {
				said = err.Error()
			}
			fmt.Fprintf(w, "waiting   %s\n", said)
		}
		wait(ctx, nil, 20*time.Millisecond)
	}
}

func health(ctx context.Context, client *http.Client, address string) (status int, said string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address+"/health", nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	return resp.StatusCode, strings.TrimSpace(string(body)), err
}

// waitStages waits until all instances on a node that should be there, which names says anew each time, say that they are ready. The gateway is
// healthy with one instance of each stage; whoever then changes "the decoder" by command should reach what was started, not what was fastest.
func waitStages(ctx context.Context, natsURL, node string, names func() []string, w io.Writer) error {
	b, err := look(ctx, natsURL, "up-ready", ackFlag{})
	for ; err != nil && ctx.Err() == nil; b, err = look(ctx, natsURL, "up-ready", ackFlag{}) { // it was there a moment ago
		wait(ctx, nil, time.Second)
	}
	if err != nil {
		return err
	}
	defer b.Close()
	view, err := b.Instances(ctx)
	if err != nil {
		return fmt.Errorf("reading heartbeats: %w", err)
	}
	for told := time.Now(); ctx.Err() == nil; {
		changed, all := view.Changed(), view.Named()
		missing := slices.DeleteFunc(names(), func(name string) bool {
			return slices.ContainsFunc(all, func(i wire.Instance) bool { return i.Node == node && i.Name == name && i.Ready })
		})
		if len(missing) == 0 {
			return nil
		}
		if time.Since(told) >= patience {
			told = time.Now()
			fmt.Fprintf(w, "waiting   for %s; requests are answered already\n", strings.Join(missing, ", "))
		}
		wait(ctx, changed, time.Second)
	}
	return ctx.Err()
}

// wait ends with the context, when c is closed, or after a time.
func wait(ctx context.Context, c <-chan struct{}, most time.Duration) {
	select {
	case <-c:
	case <-time.After(most):
	case <-ctx.Done():
	}
}
