package stage_test

import (
	"context"
	"slices"
	"testing"

	"github.com/nats-io/nats.go"

	"log/slog"

	"trireme.dev/services/hmm"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// A process starts in the layout that the one before it has left, clears what that one had pending, and does not follow a record that is not
// made for it.
func TestLayoutRestored(t *testing.T) {
	r := &rig{T: t, Rig: stagetest.New(t, func(ctx context.Context, socket string, conn *nats.Conn, log *slog.Logger) error {
		return hmm.Run(ctx, hmm.Config{Socket: socket, Node: "n", NPUs: 4, NPUBytes: 1 << 20, HostBytes: 1 << 20, NATS: conn}, log)
	}, stagetest.Long)}
	model := &r.Model.Config.Text
	layout := stage.Layout(model, placement.First(2))
	for l := range layout {
		slices.Reverse(layout[l]) // as no process places its experts by itself
	}
	key := wire.LayoutKey("n", "decoder-7")
	for name, x := range map[string]struct {
		change  func(*wire.Layout)
		follows bool
	}{
		"as it is":        {func(*wire.Layout) {}, true},
		"pending":         {func(l *wire.Layout) { l.Pending = &wire.Pending{ID: "op", Kind: wire.ChangeRebalance} }, true},
		"another model":   {func(l *wire.Layout) { l.Model[0]++ }, false},
		"asked for three": {func(l *wire.Layout) { l.Asked = 3 }, false},
		"other slots":     {func(l *wire.Layout) { l.NPUs = []int{1, -1, 2} }, false},
		"taken":           {func(l *wire.Layout) { l.NPUs = []int{0, 3} }, true}, // the test has 0
		"damaged":         {func(l *wire.Layout) { l.Experts = l.Experts[1:] }, false},
	} {
		record := &wire.Layout{
			Instance: "before", Model: r.Model.Config.Digest, Asked: 2, Epoch: 7, NPUs: []int{1, 2}, Experts: layout.Encode(),
			Last: &wire.Ended{ID: "before", Committed: true},
		}
		x.change(record)
		if err := r.Bus.DeleteLayout(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Bus.SwapLayout(t.Context(), key, record, 0); err != nil {
			t.Fatal(err)
		}
		cfg := r.Stage
		cfg.NPUs, cfg.Name = 2, "decoder-7"
		s, err := stage.Open(t.Context(), stage.Decode, cfg, r.Rig.Log)
		if err != nil {
			t.Fatal(err)
		}
		follows := true
		for slot, n := range s.NPUs() {
			for l := range layout {
				for e := range layout[l] {
					follows = follows && (n.Experts[l][e].Down.Data != nil) == layout[l][e].Has(slot)
				}
			}
		}
		if follows != x.follows {
			t.Errorf("%s: the process follows the record: %v", name, follows)
		}
		now, _, err := r.Bus.Layout(t.Context(), key)
		if err != nil || now.Instance != s.ID || now.Pending != nil || now.Epoch != map[bool]uint64{true: 7, false: 8}[x.follows] || record.Pending != nil && (now.Last.ID != "op" || now.Last.Committed) {
			t.Errorf("%s: the record is %+v, %v", name, now, err)
		}
		s.Close()
	}
}
