package gateway

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"trireme.dev/shared/bus"
)

// queueMetrics tells the depth of the stages' queues, as JetStream knows it when it is asked. Every gateway tells the
// same: take the maximum over gateways, not the sum.
type queueMetrics struct {
	queues func(context.Context) ([]bus.Queue, error)
	log    *slog.Logger
}

var (
	queueMessages = prometheus.NewDesc("trireme_queue_messages",
		"Messages on a stage's queue: pending ones wait, those in_work are taken and not acknowledged, redelivered ones are a part of these.",
		[]string{"stage", "state"}, nil)
	queueOldest = prometheus.NewDesc("trireme_queue_oldest_seconds", "Age of the oldest message on a stage's queue; 0 when it is empty.",
		[]string{"stage"}, nil)
)

// queuesTimeout bounds a look at the queues: a scrape must not hang because NATS is away.
const queuesTimeout = 2 * time.Second

// Describe implements prometheus.Collector.
func (queueMetrics) Describe(c chan<- *prometheus.Desc) { c <- queueMessages; c <- queueOldest }

// Collect implements prometheus.Collector. While NATS does not answer there are no samples.
func (m queueMetrics) Collect(c chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), queuesTimeout)
	defer cancel()
	all, err := m.queues(ctx)
	if err != nil {
		m.log.Debug("reading the queues for metrics", "error", err)
		return
	}
	for _, q := range all {
		for state, n := range map[string]int{"pending": int(q.Pending), "in_work": q.InWork, "redelivered": q.Redelivered} {
			c <- prometheus.MustNewConstMetric(queueMessages, prometheus.GaugeValue, float64(n), q.Stage, state)
		}
		c <- prometheus.MustNewConstMetric(queueOldest, prometheus.GaugeValue, q.Oldest.Seconds(), q.Stage)
	}
}
