package main

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"trireme.dev/shared/wire"
)

func TestNPUCount(t *testing.T) {
	for _, x := range []struct {
		said      string
		has, want int
	}{
		{"4", 2, 4}, {"+1", 2, 3}, {"-2", 3, 1}, {minus + "2", 3, 1}, {"64", 1, 64},
		{"-2", 2, 0}, {"0", 2, 0}, {"65", 2, 0}, {"+63", 2, 0}, {"many", 2, 0}, {"", 2, 0}, {"2x", 2, 0}, {"--2", 2, 0},
	} {
		var c npuCount
		err := c.UnmarshalText([]byte(x.said))
		got := 0
		if err == nil {
			got, err = c.of(x.has)
		}
		if got != x.want || (err == nil) != (x.want > 0) {
			t.Errorf("%q of %d: %d, %v; want %d", x.said, x.has, got, err, x.want)
		}
	}
}

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

// The parser takes all ways to write a number, and refuses what is none, before anything is connected to.
func TestScaleCommandLine(t *testing.T) {
	for _, x := range []struct{ args, want string }{
		{"scale decoder -2 --nats-url nats://127.0.0.1:1", "no NATS at"},
		{"scale decoder +2 --nats-url nats://127.0.0.1:1", "no NATS at"},
		{"scale decoder 2 --nats-url nats://127.0.0.1:1", "no NATS at"},
		{"scale decoder two", "is no number of NPUs"},
		{"scale decoder -65", "is no number of NPUs"},
		{"scale decoder", "expected \"<npus>\""},
		{"scale decoder 2 --timeout 0s", "--timeout"},
	} {
		var out, said bytes.Buffer
		if status := run(strings.Fields(x.args), nil, &out, &said); status == 0 || !strings.Contains(said.String(), x.want) {
			t.Errorf("%s: %d, %q; want %q", x.args, status, said.String(), x.want)
		}
	}
}

func TestMeant(t *testing.T) {
	all := []wire.Instance{
		{ID: "decoder-0-ab", Name: "decoder-0", Role: "decode"}, {ID: "x", Role: "prefill+decode"}, {ID: "e", Role: "encode"},
		{ID: "gateway-1", Role: "gateway"},
	}
	for _, x := range []struct{ who, which, want, err string }{
		{"encoder", "", "e", ""}, {"prefill", "", "x", ""}, {"decoder-0", "", "decoder-0-ab", ""}, {"x", "", "x", ""},
		{"decoder", "x", "x", ""}, {"decoder", "decoder-0", "decoder-0-ab", ""},
		{"decoder", "", "", "decoder-0, x"}, {"encoder", "x", "", "no such instance"}, {"gateway-1", "", "", "no such instance"},
	} {
		got, err := meant(all, x.who, x.which)
		if x.err == "" && (err != nil || got.ID != x.want) || x.err != "" && (err == nil || !strings.Contains(err.Error(), x.err)) {
			t.Errorf("%s %s: %+v, %v", x.who, x.which, got, err)
		}
	}
	if _, err := meant(nil, "decoder", ""); err == nil || err.Error() != "no decoder runs" {
		t.Error(err)
	}
}
