package main

import (
	"bytes"
	"slices"
	"strings"
	"testing"
)

func TestShielded(t *testing.T) {
	for said, want := range map[string]string{
		"scale decoder -2":              "scale decoder " + minus + "2",
		"scale -2 decoder --timeout 5s": "scale " + minus + "2 decoder --timeout 5s",
		"--log-level warn scale d -12":  "--log-level warn scale d " + minus + "12",
		"scale decoder +1 -h":           "scale decoder +1 -h",
		"events -n -2":                  "events -n -2",
	} {
		if got := shielded(strings.Fields(said)); !slices.Equal(got, strings.Fields(want)) {
			t.Errorf("%q became %q", said, got)
		}
	}
}

// A negative value of a flag belongs to the flag, whose own error is told.
func TestNegativeValues(t *testing.T) {
	for args, want := range map[string]string{
		"scale decoder --replicas -1":                              "--replicas -1 cannot be negative",
		"scale decoder 1 --timeout -1s":                            "--timeout -1s must be above 0",
		"rebalance decoder --spare -1":                             "cannot be negative",
		"chat --max-tokens -1 hi":                                  "--max-tokens -1 cannot be negative",
		"scale decoder --dry-run -2 --nats-url nats://127.0.0.1:1": "no NATS at", // --dry-run takes no value
		"scale gateway --replicas 2":                               "instead of \"gateway\"",
	} {
		var out, said bytes.Buffer
		if status := run(strings.Fields(args), nil, &out, &said); status == 0 || !strings.Contains(said.String(), want) {
			t.Errorf("%s: %d, %q; want %q", args, status, said.String(), want)
		}
	}
}

// The parser takes all ways to write a number, and refuses what is none, before anything is connected to.
func TestScaleCommandLine(t *testing.T) {
	for _, x := range []struct{ args, want string }{
		{"scale decoder -2 --nats-url nats://127.0.0.1:1", "no NATS at"},
		{"scale decoder +2 --nats-url nats://127.0.0.1:1", "no NATS at"},
		{"scale decoder 2 --nats-url nats://127.0.0.1:1", "no NATS at"},
		{"scale decoder two", "is no number of NPUs"},
		{"scale decoder -65", "is no number of NPUs"},
		{"scale decoder", "to how many NPUs"},
		{"scale decoder 2 --replicas 2", "give one of them"},
		{"scale decoder 2 --timeout 0s", "--timeout"},
	} {
		var out, said bytes.Buffer
		if status := run(strings.Fields(x.args), nil, &out, &said); status == 0 || !strings.Contains(said.String(), x.want) {
			t.Errorf("%s: %d, %q; want %q", x.args, status, said.String(), x.want)
		}
	}
}
