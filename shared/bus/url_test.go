package bus_test

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"

	"trireme.dev/shared/bus"
)

func TestRedacted(t *testing.T) {
	for urls, want := range map[string]string{
		"nats://127.0.0.1:4222":           "nats://127.0.0.1:4222",
		"nats://me:secret@10.0.0.5:4222":  "nats://xxxxx@10.0.0.5:4222",
		"nats://token@10.0.0.5":           "nats://xxxxx@10.0.0.5",
		"nats://a:b@one:1, nats://c@two,": "nats://xxxxx@one:1, nats://xxxxx@two,",
		"localhost:4222":                  "localhost:4222",
		"nats://me:se%cret@[::1":          "nats://xxxxx@[::1",
		"nats://me:s/e#c@ret@one:1":       "nats://xxxxx@one:1",
		"me:secret@one:1":                 "xxxxx@one:1",
		"nats://me:sec,ret@one:1":         "nats://xxxxx@one:1",
		"nats://one:1,tls://me:s,e,c@two": "nats://one:1,tls://xxxxx@two",
		"nats://me:s@one, nats://two":     "nats://xxxxx@one, nats://two",
		"nats://one:1,me:secret@two":      "nats://xxxxx@two",
		"me:sec,ret@one:1,two":            "xxxxx@one:1,two",
		"nats://me:a://b@one":             "nats://xxxxx@one",
		"":                                "",
	} {
		if got := bus.Redacted(urls); got != want {
			t.Errorf("%s: %s, want %s", urls, got, want)
		}
	}
}

// Neither the log nor an error tells a password.
func TestConnectTellsNoPassword(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var log bytes.Buffer
	handler := slog.NewTextHandler(writer(func(p []byte) (int, error) { cancel(); return log.Write(p) }), nil)
	_, err := bus.Connect(ctx, "nats://me:secret@127.0.0.1:1", t.Name(), slog.New(handler))
	if said := log.String() + err.Error(); strings.Contains(said, "secret") || strings.Count(said, "127.0.0.1:1") < 2 {
		t.Errorf("%s", said)
	}
}

// Of a URL that cannot be read because of its password the error has no part of that, but what is to be done.
func TestErrorsTellNoPassword(t *testing.T) {
	for _, url := range []string{"nats://me:se%cret@127.0.0.1:1", "nats://me:se#cret@127.0.0.1:1", "nats://me:se/cret@127.0.0.1:1", "nats://me:se,cret@127.0.0.1:1", "me:secret@127.0.0.1:1"} {
		_, err := bus.Look(t.Context(), url, t.Name(), quiet())
		if err == nil || strings.Contains(err.Error(), "cret") || strings.Contains(err.Error(), ":se") || !strings.Contains(err.Error(), "xxxxx@127.0.0.1:1") {
			t.Errorf("%s: %v", url, err)
		}
		if strings.Contains(url, "://") && !strings.Contains(err.Error(), "%25") {
			t.Errorf("%s: %v", url, err)
		}
	}
	if _, err := bus.Look(t.Context(), "nats://host:port", t.Name(), quiet()); err == nil || !strings.Contains(err.Error(), `invalid port ":port"`) {
		t.Errorf("a URL without a password: %v", err)
	}
}

type writer func(p []byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }
