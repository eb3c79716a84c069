package gateway

import (
	"context"
	"net/http"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/gateway/admission"
	"trireme.dev/services/gateway/openai"
	"trireme.dev/shared/wire"
)

// sink takes what would be written to a connection.
type sink struct {
	header http.Header
	bytes  int
}

func (s *sink) Header() http.Header              { return s.header }
func (s *sink) WriteHeader(int)                  {}
func (s *sink) FlushError() error                { return nil }
func (s *sink) Flush()                           {}
func (s *sink) SetWriteDeadline(time.Time) error { return nil }
func (s *sink) Write(b []byte) (int, error)      { s.bytes += len(b); return len(b), nil }

// BenchmarkTokens is what a token costs the gateway from the message of a decode step, with a token for each of 250 streams,
// to its event, without goroutines and connections.
func BenchmarkTokens(b *testing.B) {
	const streams = 250
	model, err := LoadModel("../../models/shapes-vl-moe", 1<<24)
	if err != nil {
		b.Fatal(err)
	}
	gate := admission.New(admission.Limits{Requests: streams}, time.Now)
	g := &Gateway{
		cfg: Config{Instance: "g"}.withDefaults(), name: "m", model: model, gate: gate, metrics: newMetrics("m", gate, nil),
		dispatch: &dispatcher{gateway: "g", boxes: make(map[string]*mailbox)}, demand: newDemand(),
	}
	var lives []*life
	var out sink
	out.header = make(http.Header)
	message := wire.Tokens{Instance: "decode-0123abcd"}
	for range streams {
		id := newID()
		j := &job{expected: 1 << 30}
		j.spec.Choices = 1
		q := &query{g: g, params: &openai.Params{N: 1, Logprobs: -1}, jobs: []*job{j}, id: id, began: time.Now()}
		defer g.demand.arrived(j, &q.objective, q.began)()
		s := newStream(q, &out, true, "chatcmpl-"+id)
		l := g.newLife(j, q.params, id, time.Now(), time.Now(), s.output(j, 0))
		if l.credit, err = gate.Acquire(b.Context(), admission.Request{N: 1}); err != nil {
			b.Fatal(err)
		}
		l.box = g.dispatch.open(id)
		l.resend = time.NewTimer(time.Hour)
		defer l.resend.Stop()
		lives = append(lives, l)
		message.Items = append(message.Items, wire.Run{Request: id, Attempt: 1, Generation: 7, IDs: []int32{70}})
	}
	b.ReportAllocs()
	step := 0
	for b.Loop() {
		b.StopTimer()
		for i := range message.Items {
			message.Items[i].Index = step
		}
		step++
		data, err := wire.Marshal(&message)
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if err := g.dispatch.tokens(&nats.Msg{Data: data}); err != nil {
			b.Fatal(err)
		}
		for _, l := range lives {
			if err := l.events(context.Background()); err != nil {
				b.Fatal(err)
			}
		}
	}
	if out.bytes < streams*step*50 {
		b.Fatalf("%d bytes came out of %d tokens", out.bytes, streams*step)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(streams*step), "ns/token")
}
