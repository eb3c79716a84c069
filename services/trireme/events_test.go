package main

import (
	"testing"
	"time"
)

// What there is none of is said as it was asked for.
func TestNoEvents(t *testing.T) {
	for _, x := range []struct {
		c    eventsCmd
		want string
	}{
		{eventsCmd{}, "no events"},
		{eventsCmd{Since: 24 * time.Hour}, "no events in the last 24h; --all shows all that are kept"},
		{eventsCmd{Since: 90 * time.Minute}, "no events in the last 1h30m; --all shows all that are kept"},
		{eventsCmd{Since: 70 * time.Second}, "no events in the last 1m10s; --all shows all that are kept"},
		{eventsCmd{Kind: []string{"scaler", "dead"}}, "no events of scaler, dead"},
	} {
		if got := x.c.none(); got != x.want {
			t.Errorf("%+v: %q, want %q", x.c, got, x.want)
		}
	}
}
