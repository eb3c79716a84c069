package main

import (
	"bytes"
	"testing"

	"trireme.dev/shared/hbm"
)

func TestLoading(t *testing.T) {
	set := func(loaded, bytes int64) hbm.Stats {
		return hbm.Stats{Weights: []hbm.WeightsStats{{Loaded: loaded, Bytes: (loaded + bytes) / 2, Wanted: bytes}}}
	}
	for _, tc := range []struct {
		nodes       []hbm.Stats
		done, total int64
	}{
		{nil, 0, 0},
		{[]hbm.Stats{{}}, 0, 0},
		{[]hbm.Stats{set(5, 5)}, 0, 0},
		{[]hbm.Stats{set(0, 5)}, 0, 5},
		{[]hbm.Stats{set(5, 5), set(2, 7)}, 7, 12},
	} {
		if done, total := loading(tc.nodes); done != tc.done || total != tc.total {
			t.Errorf("%+v: %d of %d, want %d of %d", tc.nodes, done, total, tc.done, tc.total)
		}
	}
	var out bytes.Buffer // no terminal: nothing is watched, nothing is written
	watchLoading(t.Context(), "nats://127.0.0.1:1", &out)()
	if out.Len() > 0 {
		t.Errorf("wrote %q", &out)
	}
}
