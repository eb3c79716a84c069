package bus_test

import (
	"errors"
	"strings"
	"testing"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/wire"
)

func TestMeant(t *testing.T) {
	all := []wire.Instance{
		{ID: "decoder-0-ab", Name: "decoder-0", Role: "decode"}, {ID: "x", Role: "prefill+decode"}, {ID: "e", Role: "encode"},
		{ID: "gateway-1", Role: "gateway"},
	}
	for _, x := range []struct{ who, which, want, err string }{
		{"encoder", "", "e", ""}, {"prefill", "", "x", ""}, {"decoder-0", "", "decoder-0-ab", ""}, {"x", "", "x", ""},
		{"decoder", "x", "x", ""}, {"decoder", "decoder-0", "decoder-0-ab", ""},
		{"decoder", "", "", "decoder-0, x"}, {"encoder", "x", "", "no such instance"}, {"gateway-1", "", "", "a gateway has no NPUs"},
		{"gateway", "", "", "a gateway has no NPUs"}, {"gateway-2", "", "", "no such instance"},
	} {
		got, err := bus.Meant(all, x.who, x.which)
		if x.err == "" && (err != nil || got.ID != x.want) || x.err != "" && (err == nil || !strings.Contains(err.Error(), x.err)) {
			t.Errorf("%s %s: %+v, %v", x.who, x.which, got, err)
		}
	}
	if _, err := bus.Meant(all, "decoder", ""); !errors.Is(err, bus.ErrNoInstance) || strings.Contains(err.Error(), "no such") {
		t.Errorf("of two decoders it is said %v", err) // there are such instances
	}
	if _, err := bus.Meant(nil, "decoder", ""); err == nil || !errors.Is(err, bus.ErrNoInstance) {
		t.Error(err)
	}
}
