package gateway

import (
	"testing"
	"time"

	"trireme.dev/shared/obs/quantile"
	"trireme.dev/shared/sched"
	"trireme.dev/shared/wire"
)

// What a gateway tells of its demand is what has come: sizes when requests arrive, latencies with the time before they were let in,
// and of those that have no first token how long they have been without.
func TestDemandCountsWhatComes(t *testing.T) {
	d, start := newDemand(), time.Now()
	at := func(s int) time.Time { return start.Add(time.Duration(s) * time.Second) }
	o := objective{class: "default", targets: sched.Targets{TTFT: 2 * time.Second, TPOT: time.Second}}
	of := func(prompt, most int) *job {
		return &job{spec: wire.Spec{Prompt: make([]int32, prompt), Choices: 1, Sampling: wire.Sampling{MaxTokens: most}}}
	}
	text, pictured, late, refused := of(10, 1000), of(200, 5), of(20, 1000), of(30, 1000)
	pictured.pictures = []*picture{{tokens: 64}, {tokens: 100}}
	for i, j := range []*job{text, pictured, late, refused} {
		defer d.arrived(j, &o, at(i))()
	}
	d.refused(refused.arrival, at(4))
	d.first(text.arrival, at(1))
	d.first(pictured.arrival, at(5)) // 4 s after it has come
	d.ended(&o, at(6), 50, 1, 100*time.Millisecond)

	got := d.read(at(7))
	if got.Requests != 4 || got.Pictured != 1 || got.Pictures != 2 || got.PictureTokens != 164 || got.PromptTokens != 260 || got.Refused != 1 {
		t.Errorf("arrivals: %+v", got)
	}
	if want := uint64(3*firstLength + 5); got.Expected != want || got.Ended != 1 || got.Lengths != 50 {
		t.Errorf("output: %d tokens expected, want %d; %d answers of %d tokens", got.Expected, want, got.Ended, got.Lengths)
	}
	if got.Awaiting != 2 || got.Oldest != 5*time.Second { // refused is until its handler has returned, here at the end
		t.Errorf("%d await their first token, for up to %v", got.Awaiting, got.Oldest)
	}
	if len(got.Classes) != 1 {
		t.Fatalf("classes: %+v", got.Classes)
	}
	c := got.Classes[0]
	ttft, err := quantile.Decode(c.TTFT.Sketch)
	if err != nil {
		t.Fatal(err)
	}
	if ttft.Count() != 2 || c.TTFT.Judged != 2 || c.TTFT.Met != 1 || c.TTFT.Refused != 1 || c.TTFT.Overdue != 2 || c.TPOT.Met != 1 {
		t.Errorf("%d first tokens; %+v", ttft.Count(), c)
	}
	if share := ttft.Within(2 * time.Second); share != 0.5 {
		t.Errorf("%v within 2 s", share)
	}
	later := of(1, 1000)
	d.arrived(later, &o, at(8))()
	if got := d.read(at(9)); got.Expected <= 3*firstLength+5 || got.Expected >= 4*firstLength+5 {
		t.Errorf("an answer of 50 tokens has taught nothing: %d expected", got.Expected)
	}
	if got := d.read(at(600)); len(got.Classes) != 1 || got.Classes[0].TTFT.Sketch != nil {
		t.Errorf("long after: %+v", got.Classes)
	}
}
