package stage

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trireme.dev/shared/stage/runner"
	"trireme.dev/shared/wire"
)

// Metrics are what every stage counts, by role. What the roles of a process compute in one step counts for each.
type Metrics struct {
	Registry *prometheus.Registry

	Work *prometheus.CounterVec   // trireme_stage_work_total by role and outcome
	Step *prometheus.HistogramVec // trireme_stage_step_seconds by the roles that have part in a forward pass, joined
	Rows *prometheus.CounterVec   // trireme_stage_rows_total by role: tokens or patches computed

	Offers *prometheus.CounterVec // trireme_stage_offers_total by role and outcome
	Copied *prometheus.CounterVec // trireme_stage_copied_bytes_total by role

	weightsSeconds *prometheus.GaugeVec // trireme_weights_seconds by phase
	first          sync.Once
	tell           func(seconds float64) // of the first step; or nil
}

// weights notes how long a phase of coming by the weights took; phases of several sets add up.
func (m *Metrics) weights(phase string, took time.Duration) {
	m.weightsSeconds.WithLabelValues(phase).Add(took.Seconds())
}

// step is who is told how long steps take that these roles, joined, have part in.
func (m *Metrics) step(roles string) runner.Observer {
	return &observer{m.Step.WithLabelValues(roles), m}
}

// Encoded is who is told how long pictures take.
func (m *Metrics) Encoded() runner.Observer { return m.step(Encode) }

// observer is a histogram of steps that tells of the first one.
type observer struct {
	prometheus.Observer
	metrics *Metrics
}

// Observe implements prometheus.Observer.
func (o *observer) Observe(seconds float64) {
	o.metrics.first.Do(func() {
		if o.metrics.tell != nil {
			o.metrics.tell(seconds)
		}
	})
	o.Observer.Observe(seconds)
}

// newMetrics makes the metrics of a process with these roles, joined, which has so many NPUs. Those of paced NPUs are labelled with
// the profile; "": none is paced.
func newMetrics(role, profile string, paced func() pacing, npus func() int) *Metrics {
	m := &Metrics{
		Registry: prometheus.NewRegistry(),
		Work: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "trireme_stage_work_total", Help: "Messages settled, by role and outcome.",
		}, []string{"role", "outcome"}),
		Step: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "trireme_stage_step_seconds", Help: "Duration of one forward pass, by the roles that have part in it.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 16),
		}, []string{"role"}),
		Rows: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "trireme_stage_rows_total", Help: "Rows computed: patches in encode, tokens in prefill and decode.",
		}, []string{"role"}),
		Offers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "trireme_stage_offers_total",
			Help: "Messages offered to an instance that has what the work needs, by role and outcome: taken, refused, unanswered; and " +
				"accepted, of those that others have offered to this one.",
		}, []string{"role", "outcome"}),
		Copied: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "trireme_stage_copied_bytes_total", Help: "Bytes copied from other memory domains of the node, by role.",
		}, []string{"role"}),
		weightsSeconds: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "trireme_weights_seconds", ConstLabels: prometheus.Labels{"role": role},
			Help: "What it took to come by the weights, by phase: wait for another instance to load them, load from files, copy from other memory domains, attach " +
				"(calls and maps), populate page tables, first_step (the first forward pass).",
		}, []string{"phase"}),
	}
	m.Registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "trireme_stage_npus", ConstLabels: prometheus.Labels{"role": role}, Help: "NPUs of the instance; 0: it is a standby.",
	}, func() float64 { return float64(npus()) }))
	for _, r := range wire.Roles(role) { // there from the beginning, so that rates have something to start from
		m.Rows.WithLabelValues(r)
		m.Step.WithLabelValues(r)
		m.Copied.WithLabelValues(r)
	}
	if profile == "" {
		m.Registry.MustRegister(m.Work, m.Step, m.Rows, m.Offers, m.Copied, m.weightsSeconds)
		return m
	}
	seconds := func(name, help string, of func(pacing) time.Duration) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 { return of(paced()).Seconds() })
	}
	prometheus.WrapRegistererWith(prometheus.Labels{"paced": profile}, m.Registry).MustRegister(
		m.Work, m.Step, m.Rows, m.Offers, m.Copied, m.weightsSeconds,
		seconds("trireme_paced_busy_seconds_total", "Time that the profile of the paced NPUs has asked for, of all together.",
			func(p pacing) time.Duration { return p.busy }),
		seconds("trireme_paced_behind_seconds_total", "Time by which the host was too slow for the profile: figures are the host's "+
			"and not the profile's unless it is small beside trireme_paced_busy_seconds_total.", func(p pacing) time.Duration { return p.behind }))
	return m
}
