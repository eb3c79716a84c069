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
		"nats://a:b@one:1, nats://c@two,": "nats://xxxxx@one:1,nats://xxxxx@two,",
		"localhost:4222":                  "localhost:4222",
		"nats://me:se%cret@[::1":          "xxxxx@[::1",
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

type writer func(p []byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }
