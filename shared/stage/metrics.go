package stage

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are what every stage counts.
type Metrics struct {
	Registry *prometheus.Registry
	Work     *prometheus.CounterVec // trireme_stage_work_total by outcome
	Step     prometheus.Histogram   // trireme_stage_step_seconds: one forward pass
	Rows     prometheus.Counter     // trireme_stage_rows_total: tokens or patches computed

	weightsSeconds *prometheus.GaugeVec // trireme_weights_seconds by phase
	stepped        firstStep
}

// weights notes how long a phase of coming by the weights took; phases of several sets add up.
func (m *Metrics) weights(phase string, took time.Duration) {
	m.weightsSeconds.WithLabelValues(phase).Add(took.Seconds())
}

// firstStep is a histogram of steps that tells of the first one.
type firstStep struct {
	prometheus.Histogram
	once sync.Once
	tell func(seconds float64) // or nil
}

// Observe implements prometheus.Observer.
func (f *firstStep) Observe(seconds float64) {
	f.once.Do(func() {
		if f.tell != nil {
			f.tell(seconds)
		}
	})
	f.Histogram.Observe(seconds)
}

func newMetrics(role string) *Metrics {
	labels := prometheus.Labels{"role": role}
	m := &Metrics{
		Registry: prometheus.NewRegistry(),
		Work: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "trireme_stage_work_total", Help: "Messages settled, by outcome.", ConstLabels: labels,
		}, []string{"outcome"}),
		Rows: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "trireme_stage_rows_total", Help: "Rows computed: patches in encode, tokens in prefill and decode.",
			ConstLabels: labels,
		}),
	}
	m.stepped.Histogram = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "trireme_stage_step_seconds", Help: "Duration of one forward pass.", ConstLabels: labels,
		Buckets: prometheus.ExponentialBuckets(0.0005, 2, 16),
	})
	m.Step = &m.stepped
	m.weightsSeconds = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "trireme_weights_seconds", ConstLabels: labels,
		Help: "What it took to come by the weights, by phase: wait for another instance to load them, load from files, attach " +
			"(calls and maps), populate page tables, first_step (the first forward pass).",
	}, []string{"phase"})
	m.Registry.MustRegister(m.Work, m.stepped.Histogram, m.Rows, m.weightsSeconds)
	return m
}
