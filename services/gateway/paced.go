package gateway

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"trireme.dev/shared/bus"
)

// paced lists the profiles that NPUs are slowed down to (shared/npu/pace), none when figures are those of this machine.
func (g *Gateway) paced() []string {
	var out []string
	for profile := range pacedInstances(g.instances) {
		out = append(out, profile)
	}
	slices.Sort(out)
	return out
}

// pacedInstances counts instances with paced NPUs by profile.
func pacedInstances(all *bus.Instances) map[string]int {
	n := make(map[string]int)
	for _, i := range all.All() {
		if i.Paced != "" {
			n[i.Paced]++
		}
	}
	return n
}

// pacedMetrics marks the gateway's figures as those of paced NPUs while there are any.
type pacedMetrics struct{ instances *bus.Instances }

var pacedDesc = prometheus.NewDesc("trireme_paced_instances",
	"Instances whose NPUs are slowed down to a profile; while there are any, latencies and rates are not this machine's.",
	[]string{"paced"}, nil)

// Describe implements prometheus.Collector.
func (pacedMetrics) Describe(c chan<- *prometheus.Desc) { c <- pacedDesc }

// Collect implements prometheus.Collector.
func (m pacedMetrics) Collect(c chan<- prometheus.Metric) {
	for profile, n := range pacedInstances(m.instances) {
		c <- prometheus.MustNewConstMetric(pacedDesc, prometheus.GaugeValue, float64(n), profile)
	}
}
