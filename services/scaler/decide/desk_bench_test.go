package decide_test

import (
	"encoding/json"
	"testing"

	"trireme.dev/shared/sched/autoscale"
)

// BenchmarkTurn is a decision of three instances, and how large it is in a record.
func BenchmarkTurn(b *testing.B) {
	d, f := newDesk(autoscale.Auto), newFleet(3, 4, 5)
	f.load = 6
	var bytes int
	for b.Loop() {
		v := f.tick()
		t := d.Turn(v, false, able)
		if bytes > 0 {
			continue
		}
		view, err := json.Marshal(v)
		if err != nil {
			b.Fatal(err)
		}
		decision, err := json.Marshal(&t.Decision)
		if err != nil {
			b.Fatal(err)
		}
		bytes = len(view) + len(decision)
	}
	b.ReportMetric(float64(bytes), "bytes/line")
}
