package main

import (
	"slices"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
)

// memoryMetrics exposes the HMM's accounting: the figures of `trireme status --json` under the same words.
type memoryMetrics struct{ stats func() hbm.Stats }

func memoryDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("trireme_hmm_"+name, help, labels, nil)
}

// By NPU (node/0, node/host) and kind; each kind of a figure is a metric of its own, as their sum would say nothing.
var (
	memUsed = memoryDesc("memory_used_bytes", "Content of objects.", "npu", "kind")
	memPad  = memoryDesc("memory_padded_bytes", "Lost to whole pages.", "npu", "kind")
	memRest = memoryDesc("memory_cached_bytes", "Of used and padded: only a cache keeps it, whoever needs room gets it.", "npu", "kind")
	memPeak = memoryDesc("memory_peak_bytes", "Most of used and padded since the HMM started.", "npu", "kind")
	memFree = memoryDesc("memory_free_bytes", "Neither used nor padded.", "npu")
	memSize = memoryDesc("memory_capacity_bytes", "Used, padded and free together.", "npu")
	// kvUsage is called as in vLLM.
	kvUsage = prometheus.NewDesc("trireme_kv_cache_usage_perc", "Part of an NPU's memory whose KV somebody holds, 0 to 1.", []string{"npu"}, nil)
)

// By space: host memory, and a memory domain.
var (
	spaceBooked   = memoryDesc("space_booked_bytes", "Used and padded, of all NPUs with memory in the space.", "space")
	spaceKept     = memoryDesc("space_kept_bytes", "Freed and kept to be used again, or taken from the system ahead.", "space")
	spaceUnready  = memoryDesc("space_unready_bytes", "To be taken from the system ahead (--ready-memory), and not yet there.", "space")
	spaceResident = memoryDesc("space_resident_bytes", "What the space takes of the machine, by the system's books.", "space")
)

// Of the books.
var (
	hmmObjects  = memoryDesc("objects", "Objects in device memory, other than weights.")
	hmmResting  = memoryDesc("objects_resting", "Objects that only a cache keeps.")
	hmmHolds    = memoryDesc("holds", "Objects times their holders.")
	hmmRequests = memoryDesc("requests", "Requests that have not ended.")
	hmmEnded    = memoryDesc("requests_ended", "Ended requests that are remembered.")
	hmmClaims   = memoryDesc("claims", "Parts of requests that somebody runs.")
	hmmOrphans  = memoryDesc("claims_orphaned", "Claims whose claimant is gone.")
	hmmConns    = memoryDesc("connections", "Clients.")
	hmmCachedMM = memoryDesc("mm_cache_objects", "Encoded pictures in the cache, held or not.")
	hmmBlocks   = memoryDesc("prefix_cache_blocks", "KV blocks in the prefix index, held or not.")
	hmmSets     = memoryDesc("weights_bytes", "Weight sets: bytes of content.", "set", "domain")
	hmmLoaded   = memoryDesc("weights_loaded_bytes", "Weight sets: bytes of content that are there.", "set", "domain")
	hmmHolders  = memoryDesc("weights_holders", "Weight sets: clients that have them open.", "set", "domain")
	hmmCopied   = memoryDesc("copied_bytes_total", "Bytes that clients have copied between memory domains.")
)

// Describe implements prometheus.Collector.
func (memoryMetrics) Describe(c chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		memUsed, memPad, memRest, memPeak, memFree, memSize, kvUsage, spaceBooked, spaceKept, spaceUnready, spaceResident,
		hmmObjects, hmmResting, hmmHolds, hmmRequests, hmmEnded, hmmClaims, hmmOrphans, hmmConns, hmmCachedMM, hmmBlocks, hmmCopied,
		hmmSets, hmmLoaded, hmmHolders,
	} {
		c <- d
	}
}

// Collect implements prometheus.Collector.
func (m memoryMetrics) Collect(c chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v int64, labels ...string) {
		c <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	s := m.stats()
	for _, n := range slices.Concat(s.Memory, s.Shared) {
		npu := npuName(s.Node, n.NPU)
		gauge(memSize, n.Capacity, npu)
		gauge(memFree, n.Free, npu)
		for kind, u := range n.Kinds {
			gauge(memUsed, u.Used, npu, kind)
			gauge(memPad, u.Padded, npu, kind)
			gauge(memRest, u.Cached, npu, kind)
			gauge(memPeak, u.Peak, npu, kind)
		}
		if n.NPU >= 0 && n.Capacity > 0 {
			kv := n.Kinds[mem.KindKV.String()]
			c <- prometheus.MustNewConstMetric(kvUsage, prometheus.GaugeValue,
				float64(kv.Used+kv.Padded-kv.Cached)/float64(n.Capacity), npu)
		}
	}
	for _, space := range s.Spaces {
		name := s.Node + "/" + space.Name
		gauge(spaceBooked, space.Booked, name)
		gauge(spaceKept, space.Kept, name)
		gauge(spaceUnready, space.Unready, name)
		gauge(spaceResident, space.Resident, name)
	}
	for _, w := range s.Weights {
		set, domain := setName(w), strconv.Itoa(w.Domain)
		gauge(hmmSets, w.Bytes, set, domain)
		gauge(hmmLoaded, w.Loaded, set, domain)
		gauge(hmmHolders, int64(w.Holders), set, domain)
	}
	for d, n := range map[*prometheus.Desc]int{
		hmmObjects: s.Objects, hmmResting: s.Resting, hmmHolds: s.Holds, hmmRequests: s.Requests, hmmEnded: s.Ended, hmmClaims: s.Claims,
		hmmOrphans: s.Orphans, hmmConns: s.Connections, hmmCachedMM: s.CachedMM, hmmBlocks: s.CachedBlocks,
	} {
		gauge(d, int64(n))
	}
	c <- prometheus.MustNewConstMetric(hmmCopied, prometheus.CounterValue, float64(s.Copied))
}
