package scaler

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trireme.dev/services/scaler/explain"
	"trireme.dev/shared/obs"
	"trireme.dev/shared/sched/autoscale"
)

// metrics are what the scaler tells of itself.
type metrics struct {
	registry *prometheus.Registry

	leads, blind, spare *prometheus.GaugeVec // without labels
	mode                *prometheus.GaugeVec // by mode: 1 of the one in force
	age                 *prometheus.GaugeVec // by signal
	need, npus          *prometheus.GaugeVec // by stage
	utilisation         *prometheus.GaugeVec // by stage
	met                 *prometheus.GaugeVec // by target
	decisions           *prometheus.CounterVec
	changes             *prometheus.CounterVec
	refused             prometheus.Counter
}

func newMetrics() *metrics {
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "trireme_scaler_" + name, Help: help}, labels)
	}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trireme_scaler_" + name, Help: help}, labels)
	}
	m := &metrics{
		registry:    prometheus.NewRegistry(),
		leads:       gauge("leads", "1 when this scaler decides and acts, 0 when another one does."),
		blind:       gauge("blind", "1 when signals are missing or too old, so that nothing is decided."),
		spare:       gauge("spare_npus", "NPUs that nobody has."),
		mode:        gauge("mode", "1 of the mode in force: off, advise or auto.", "mode"),
		age:         gauge("signal_age_seconds", "Age of what is known when it is decided by: demand, queues, instances; -1 when it is not known.", "signal"),
		need:        gauge("need_npus", "NPUs that a stage needs for what arrives and what waits. None while there is work and it is not known how much an NPU does.", "stage"),
		npus:        gauge("npus", "NPUs with the role that are ready.", "stage"),
		utilisation: gauge("utilisation", "What is asked of a stage over what it is sized for: 1 is what is wanted. None where need_npus has none.", "stage"),
		met:         gauge("slo_met_ratio", "Part of the requests of lately that met the target: ttft, tpot. None when there were no requests.", "target"),
		decisions:   counter("decisions_total", "Changes that were chosen, by action and result: begun, or advised.", "action", "result"),
		changes:     counter("changes_total", "Changes that have ended, by action and result: made, or failed.", "action", "result"),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "trireme_scaler_policy_refused_total", Help: "Policy files that could not be used.",
		}),
	}
	m.registry.MustRegister(m.leads, m.blind, m.spare, m.mode, m.age, m.need, m.npus, m.utilisation, m.met, m.decisions, m.changes, m.refused)
	obs.AddProcess(m.registry)
	return m
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// tell shows a status.
func (m *metrics) tell(s *explain.Status) {
	m.leads.WithLabelValues().Set(truth(s.Leads))
	for _, mode := range []autoscale.Mode{autoscale.Off, autoscale.Advise, autoscale.Auto} {
		m.mode.WithLabelValues(string(mode)).Set(truth(mode == s.Mode))
	}
	for signal, age := range map[string]time.Duration{"demand": s.Ages.Demand, "queues": s.Ages.Queues, "instances": s.Ages.Instances} {
		seconds := age.Seconds()
		if age < 0 {
			seconds = -1
		}
		m.age.WithLabelValues(signal).Set(seconds)
	}
	d := &s.Decision
	m.blind.WithLabelValues().Set(truth(d.Blind))
	if d.Blind {
		return
	}
	m.spare.WithLabelValues().Set(float64(d.Inputs.Spare))
	for k := range autoscale.Stages {
		stage, in := autoscale.Stage(k).String(), &d.Inputs.Stages[k]
		m.npus.WithLabelValues(stage).Set(float64(in.NPUs))
		if in.Unknown { // 0 would be a reason to take away
			m.need.DeleteLabelValues(stage)
			m.utilisation.DeleteLabelValues(stage)
			continue
		}
		m.need.WithLabelValues(stage).Set(in.Need)
		m.utilisation.WithLabelValues(stage).Set(d.Inputs.Utilisation[k])
	}
	for target, met := range map[string]float64{"ttft": d.Inputs.TTFT, "tpot": d.Inputs.TPOT} {
		if met < 0 {
			m.met.DeleteLabelValues(target)
		} else {
			m.met.WithLabelValues(target).Set(met)
		}
	}
}
