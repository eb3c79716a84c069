package stage

import (
	"time"

	dto "github.com/prometheus/client_model/go"

	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/obs"
	"trireme.dev/shared/wire"
)

// stats is what the instance says of its work to whoever asks (wire.SubjectStats): the scaler above all. It comes from the metrics, so
// that nothing is counted twice.
func (s *Stage) stats() *wire.Stats {
	paced := s.pacing()
	w := &wire.StageStats{Busy: s.Runner.Busy(), Balance: 1, PacedBusy: paced.busy, PacedBehind: paced.behind}
	roles := make(map[string]*wire.RoleStats)
	for _, r := range s.roles {
		w.Roles = append(w.Roles, wire.RoleStats{Role: r.Name})
	}
	for i := range w.Roles {
		roles[w.Roles[i].Role] = &w.Roles[i]
	}
	of := func(joined string, f func(*wire.RoleStats)) {
		for _, name := range wire.Roles(joined) {
			if r := roles[name]; r != nil {
				f(r)
			}
		}
	}
	patches := map[string]uint64{Encode: 1, Prefill: 1, Decode: 1} // of a token
	if v := s.Model.Vision; v != nil {
		patches[Encode] = uint64(v.Merge * v.Merge)
	}
	obs.Each(s.Metrics.Work, func(labels map[string]string, m *dto.Metric) {
		of(labels["role"], func(r *wire.RoleStats) { r.Done += uint64(m.Counter.GetValue()) })
	})
	obs.Each(s.Metrics.Rows, func(labels map[string]string, m *dto.Metric) {
		of(labels["role"], func(r *wire.RoleStats) { r.Rows += uint64(m.Counter.GetValue()) / patches[r.Role] })
	})
	obs.Each(s.Metrics.Step, func(labels map[string]string, m *dto.Metric) {
		of(labels["role"], func(r *wire.RoleStats) {
			r.Steps += m.Histogram.GetSampleCount()
			r.Spent += time.Duration(m.Histogram.GetSampleSum() * float64(time.Second))
		})
	})
	s.load.each(func(role string, has, room int) {
		of(role, func(r *wire.RoleStats) { r.InWork, r.Room = has, room })
	})
	for _, n := range s.NPUs() {
		switch c := n.Compute.(type) {
		case nil: // a hole
		case *pace.Compute:
			w.NPUs = append(w.NPUs, wire.NPUWork{NPU: n.Number, Busy: c.Busy()})
		default: // all NPUs of an instance have part in each step
			w.NPUs = append(w.NPUs, wire.NPUWork{NPU: n.Number, Busy: w.Busy})
		}
	}
	if hasText(s.Role) {
		w.Balance, w.Rows = s.changes.balance()
	}
	return &wire.Stats{Instance: s.ID, Role: s.Role, Node: s.HBM.Node(), Work: w}
}

// balance is how evenly the experts' load of lately is spread over the NPUs, and of how many rows that is.
func (c *changes) balance() (float64, uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	load, rows := c.recent.Load(nil)
	if rows == 0 {
		return 1, 0
	}
	return c.layout.Balance(load, setOf(c.stage.NPUs())), rows
}

// each calls f for every role with what it has in work and has room for.
func (l *load) each(f func(role string, has, room int)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for role, room := range l.room {
		f(role, *l.of(role), room)
	}
}
