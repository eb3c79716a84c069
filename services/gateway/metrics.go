package gateway

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"trireme.dev/services/gateway/admission"
)

// metrics are the gateway's numbers, in a registry of their own. Names after the prefix are vLLM's where vLLM has the
// number (vllm/v1/metrics/loggers.py), and so are most bucket edges; tokens come faster here, so inter-token latency has
// finer ones below 10 ms.
type metrics struct {
	registry *prometheus.Registry

	ttft       prometheus.Histogram
	interToken prometheus.Histogram
	e2e        prometheus.Histogram
	queued     *prometheus.HistogramVec

	prompt    prometheus.Counter
	generated prometheus.Counter
	computed  prometheus.Counter
	cached    prometheus.Counter
	prefixes  prometheus.Counter
	mmQueries prometheus.Counter
	mmHits    prometheus.Counter
	pictures  prometheus.Counter
	attempts  prometheus.Counter
	yields    prometheus.Counter
	resends   prometheus.Counter
	finished  *prometheus.CounterVec
	failed    *prometheus.CounterVec
	refused   *prometheus.CounterVec
	slo       *prometheus.CounterVec
	dead      *prometheus.CounterVec
	unburied  *prometheus.CounterVec
}

func newMetrics(model string, gate *admission.Gate, classes []string) *metrics {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	in := prometheus.WrapRegistererWith(prometheus.Labels{"model_name": model}, registry)
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "trireme_" + name, Help: help, Buckets: buckets})
		in.MustRegister(h)
		return h
	}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "trireme_" + name, Help: help})
		in.MustRegister(c)
		return c
	}
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "trireme_" + name, Help: help}, labels)
		in.MustRegister(c)
		return c
	}
	gauge := func(name, help string, f func() int) {
		in.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "trireme_" + name, Help: help},
			func() float64 { return float64(f()) }))
	}
	gauge("num_requests_running", "Requests let in and not finished.", func() int { open, _ := gate.Load(); return open })
	gauge("num_requests_waiting", "Requests waiting for capacity.", func() int { _, waiting := gate.Load(); return waiting })
	in.MustRegister(waitingMetrics{gate, append(classes, admission.ClassBegun)})
	latency := []float64{0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960}
	queued := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "trireme_request_queue_time_seconds",
		Help: "Waiting for capacity, by class; of requests let in.", Buckets: append([]float64{0.001, 0.01, 0.1}, latency...)}, []string{"class"})
	in.MustRegister(queued)
	return &metrics{
		registry: registry,
		ttft: histogram("time_to_first_token_seconds", "From a request's arrival to its first token.",
			[]float64{0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640}),
		interToken: histogram("inter_token_latency_seconds", "Between two deliveries of tokens of one request.",
			[]float64{0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80}),
		e2e:       histogram("e2e_request_latency_seconds", "From a request's arrival to the end of its answer.", latency),
		queued:    queued,
		prompt:    counter("prompt_tokens_total", "Prompt tokens of requests let in."),
		generated: counter("generation_tokens_total", "Tokens taken from the stages."),
		computed:  counter("prefill_computed_tokens_total", "Prompt tokens that prefill computed."),
		cached:    counter("prefix_cache_hits_total", "Prompt tokens taken from the prefix cache."),
		prefixes:  counter("prefix_cache_queries_total", "Prompt tokens looked for in the prefix cache."),
		mmQueries: counter("mm_cache_queries_total", "Pictures looked for in the cache of MM objects."),
		mmHits:    counter("mm_cache_hits_total", "Pictures that were in it, or were being encoded for another request."),
		pictures:  counter("pictures_total", "Pictures of requests let in."),
		attempts:  counter("request_restarts_total", "Requests started again after an attempt was lost."),
		yields:    counter("request_yields_total", "Requests that gave up their memory to older ones and went on later."),
		resends:   counter("token_resends_total", "Questions for tokens that did not arrive."),
		finished:  counters("request_success_total", "Choices that ended well, by finish reason.", "finished_reason"),
		failed:    counters("request_failure_total", "Requests that did not, by HTTP status; 499 means that the client left.", "status"),
		refused: counters("request_refusals_total", "Requests refused for want of capacity, by class and reason: queue_full, wait (the longest wait has passed), late (it cannot meet its targets).",
			"class", "reason"),
		dead: counters("dead_letters_total", "Requests that failed for good and not by their clients' fault, stored as dead letters, by reason: "+
			"quarantined, attempts (all were lost), fault (a stage cannot run them).", "reason"),
		unburied: counters("dead_letters_lost_total", "Dead letters, or their requests, that could not be stored, by what is missing.", "what"),
		slo: counters("slo_requests_total", "Requests that ended well and had a target, by class, target (ttft, tpot) and whether they met it; time in the queue counts.",
			"class", "target", "met"),
	}
}

// waitingMetrics tells how many requests of each class wait, also those of which none does.
type waitingMetrics struct {
	gate    *admission.Gate
	classes []string
}

var requestsWaiting = prometheus.NewDesc("trireme_class_requests_waiting",
	"Requests waiting for capacity by class; begun: answers that gave up their memory to older ones.", []string{"class"}, nil)

// Describe implements prometheus.Collector.
func (waitingMetrics) Describe(c chan<- *prometheus.Desc) { c <- requestsWaiting }

// Collect implements prometheus.Collector.
func (m waitingMetrics) Collect(c chan<- prometheus.Metric) {
	waiting := m.gate.Waiting()
	for _, class := range m.classes {
		c <- prometheus.MustNewConstMetric(requestsWaiting, prometheus.GaugeValue, float64(waiting[class]), class)
	}
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{EnableOpenMetrics: true})
}
