package gateway

import (
	"strings"
	"testing"
	"time"

	"trireme.dev/services/gateway/admission"
)

// Who is refused is told what bounds it: memory only where there is too little, the queue where that is full.
func TestOverloadedSaysWhatBoundsIt(t *testing.T) {
	const mib = 1 << 20
	some := admission.Refusal{
		RetryAfter: 19 * time.Second, Open: 174, Waiting: 1024,
		Need: admission.Bytes{KV: mib}, Used: admission.Bytes{KV: 141 * mib}, Capacity: admission.Capacity{KV: 2048 * mib, Both: 2048 * mib},
	}
	for _, x := range []struct {
		reason admission.Reason
		used   int64
		want   string
	}{
		{admission.QueueFull, 141 * mib, "All capacity is in use: 174 requests in work, 1024 waiting, which is as many as may (--max-queue). Please try again in 19 s."},
		{admission.Waited, 141 * mib, "All capacity is in use: 174 requests in work, 1024 waiting; this one has waited for as long as it may (--queue-wait). Please try again in 19 s."},
		{admission.Waited, 2048 * mib, "; this one needs 1 MiB for KV (2 GiB of 2 GiB are taken) and 1 MiB for both together (2 GiB of 2 GiB are taken). Please"},
		{admission.Late, 141 * mib, "waiting; it would come too late for the targets of this one ("},
	} {
		r := some
		r.Reason, r.Used.KV = x.reason, x.used
		if e := overloaded(&r, &objective{}); e.Status != 429 || !strings.Contains(e.Message, x.want) {
			t.Errorf("%s: %d %s; want %q", x.reason, e.Status, e.Message, x.want)
		}
	}
}
