package stage

import "github.com/prometheus/client_golang/prometheus"

// Metrics are what every stage counts.
type Metrics struct {
	Registry *prometheus.Registry
	Work     *prometheus.CounterVec // trireme_stage_work_total by outcome
	Step     prometheus.Histogram   // trireme_stage_step_seconds: one forward pass
	Rows     prometheus.Counter     // trireme_stage_rows_total: tokens or patches computed
}

func newMetrics(role string) *Metrics {
	labels := prometheus.Labels{"role": role}
	m := &Metrics{
		Registry: prometheus.NewRegistry(),
		Work: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "trireme_stage_work_total", Help: "Messages settled, by outcome.", ConstLabels: labels,
		}, []string{"outcome"}),
		Step: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "trireme_stage_step_seconds", Help: "Duration of one forward pass.", ConstLabels: labels,
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 16),
		}),
		Rows: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "trireme_stage_rows_total", Help: "Rows computed: patches in encode, tokens in prefill and decode.",
			ConstLabels: labels,
		}),
	}
	m.Registry.MustRegister(m.Work, m.Step, m.Rows)
	return m
}
