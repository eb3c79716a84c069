package scaler

import (
	"testing"

	"trireme.dev/services/scaler/explain"
	"trireme.dev/shared/sched/autoscale"
)

// A need that is not known is no series, and not 0: whoever scales by it (KEDA) would take pods away that have work.
func TestMetricsOfWhatIsNotKnown(t *testing.T) {
	m := newMetrics()
	var s explain.Status
	prefill := &s.Decision.Inputs.Stages[autoscale.Prefill]
	needs := func() map[string]float64 {
		t.Helper()
		all, err := m.registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		by := map[string]float64{}
		for _, f := range all {
			if f.GetName() != "trireme_scaler_need_npus" {
				continue
			}
			for _, x := range f.GetMetric() {
				by[x.GetLabel()[0].GetValue()] = x.GetGauge().GetValue()
			}
		}
		return by
	}
	for _, x := range []struct {
		what    string
		unknown bool
		need    float64
	}{{"at first", true, 0}, {"measured", false, 2.5}, {"forgotten", true, 0}, {"no work", false, 0}} {
		prefill.Unknown, prefill.Need = x.unknown, x.need
		m.tell(&s)
		by := needs()
		if need, there := by["prefill"]; there == x.unknown || need != x.need || len(by) != len(s.Decision.Inputs.Stages)-map[bool]int{true: 1}[x.unknown] {
			t.Errorf("%s: %v; want %v, known: %v", x.what, by, x.need, !x.unknown)
		}
	}
}
