package obs

import (
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// Value is what a counter or a gauge stands at, for whoever needs it for something else than a scrape.
func Value(m prometheus.Metric) float64 {
	var d dto.Metric
	if err := m.Write(&d); err != nil {
		panic("BUG: a metric that cannot be read: " + err.Error())
	}
	switch {
	case d.Counter != nil:
		return d.Counter.GetValue()
	case d.Gauge != nil:
		return d.Gauge.GetValue()
	}
	panic("BUG: a metric that is neither a counter nor a gauge")
}

// Each calls f with every metric of a collector and its labels.
func Each(c prometheus.Collector, f func(labels map[string]string, m *dto.Metric)) {
	all := make(chan prometheus.Metric)
	go func() {
		defer close(all)
		c.Collect(all)
	}()
	for m := range all {
		var d dto.Metric
		if err := m.Write(&d); err != nil {
			panic("BUG: a metric that cannot be read: " + err.Error())
		}
		labels := make(map[string]string, len(d.Label))
		for _, l := range d.Label {
			labels[l.GetName()] = l.GetValue()
		}
		f(labels, &d)
	}
}
