package gateway

import (
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vmihailenco/msgpack/v5"

	"trireme.dev/services/gateway/openai"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/model"
	"trireme.dev/shared/wire"
)

func ptr[T any](v T) *T { return &v }

func TestSamplingDefaults(t *testing.T) {
	full := hf.Generation{DoSample: ptr(true), Temperature: ptr(0.75), TopP: ptr(0.5), TopK: ptr(20), MinP: ptr(0.25),
		RepetitionPenalty: ptr(1.5), MaxNewTokens: ptr(30), EOS: []int{9, 3}}
	greedy := full
	greedy.DoSample = ptr(false)
	silent := full
	silent.DoSample = nil
	none := hf.Generation{EOS: []int{9}}
	base := openai.Params{N: 1, Logprobs: -1, Seed: ptr(uint64(5))}
	with := func(f func(p *openai.Params)) openai.Params {
		p := base
		f(&p)
		return p
	}
	for _, test := range []struct {
		name   string
		file   hf.Generation
		params openai.Params
		want   wire.Sampling
	}{
		{"neutral", none, base, wire.Sampling{MaxTokens: 90, Temperature: 1, TopP: 1, Repetition: 1, Seed: 5, Stop: []int32{9}, Logprobs: -1}},
		{"from the file", full, base, wire.Sampling{MaxTokens: 30, Temperature: 0.75, TopP: 0.5, TopK: 20, MinP: 0.25, Repetition: 1.5, Seed: 5, Stop: []int32{3, 9}, Logprobs: -1}},
		{"do_sample not said", silent, base, wire.Sampling{MaxTokens: 30, Temperature: 0.75, TopP: 0.5, TopK: 20, MinP: 0.25, Repetition: 1.5, Seed: 5, Stop: []int32{3, 9}, Logprobs: -1}},
		{"do_sample false", greedy, base, wire.Sampling{MaxTokens: 30, TopP: 1, Repetition: 1.5, Seed: 5, Stop: []int32{3, 9}, Logprobs: -1}},
		{"do_sample false, but asked for", greedy, with(func(p *openai.Params) { p.Temperature = ptr(1.5) }),
			wire.Sampling{MaxTokens: 30, Temperature: 1.5, TopP: 0.5, TopK: 20, MinP: 0.25, Repetition: 1.5, Seed: 5, Stop: []int32{3, 9}, Logprobs: -1}},
		{"the request wins", full, with(func(p *openai.Params) {
			p.Temperature, p.TopP, p.TopK, p.MinP, p.Repetition, p.MaxTokens = ptr(0.5), ptr(1.0), ptr(0), ptr(0.0), ptr(1.0), ptr(80)
			p.Presence, p.Frequency, p.MinTokens, p.Logprobs, p.StopTokenIDs = 0.5, -0.5, 4, 3, []int32{7, 3}
		}), wire.Sampling{MaxTokens: 80, MinTokens: 4, Temperature: 0.5, TopP: 1, Repetition: 1, Presence: 0.5, Frequency: -0.5, Seed: 5, Stop: []int32{3, 7, 9}, Logprobs: 3}},
		{"temperature 0", full, with(func(p *openai.Params) { p.Temperature = ptr(0.0) }),
			wire.Sampling{MaxTokens: 30, TopP: 1, Repetition: 1.5, Seed: 5, Stop: []int32{3, 9}, Logprobs: -1}},
		{"ignore_eos", full, with(func(p *openai.Params) { p.IgnoreEOS, p.StopTokenIDs = true, []int32{7} }),
			wire.Sampling{MaxTokens: 30, Temperature: 0.75, TopP: 0.5, TopK: 20, MinP: 0.25, Repetition: 1.5, Seed: 5, Stop: []int32{7}, Logprobs: -1}},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := &Model{Config: model.Config{Text: model.Text{Context: 100, Vocab: 50}}, Generation: test.file}
			got, err := m.sampling(&test.params, 10, "messages")
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(wire.Sampling{})); diff != "" {
				t.Error(diff)
			}
		})
	}
	m := &Model{Config: model.Config{Text: model.Text{Context: 100, Vocab: 50}}}
	unseeded := base
	unseeded.Seed = nil
	a, _ := m.sampling(&unseeded, 10, "messages")
	b, _ := m.sampling(&unseeded, 10, "messages")
	if a.Seed == b.Seed {
		t.Error("two requests without a seed got the same one")
	}
	for prompt, want := range map[int]string{99: "", 100: "messages", 101: "messages"} {
		_, err := m.sampling(&base, prompt, "messages")
		var e *openai.Error
		if errors.As(err, &e) != (want != "") || (e != nil && (e.Param != want || e.Code != "context_length_exceeded")) {
			t.Errorf("prompt of %d: %v", prompt, err)
		}
	}
}

func TestIDs(t *testing.T) {
	seen := make(map[string]bool)
	for range 1000 {
		id := newID()
		if len(id) != 22 || seen[id] {
			t.Fatalf("id %q", id)
		}
		seen[id] = true
	}
}

// TestJoinSizeIsEnough fills a join record with the largest handles and compares.
func TestJoinSizeIsEnough(t *testing.T) {
	const node = "a-node-with-quite-a-long-name.example.org"
	for _, spec := range []int{0, wire.MaxInline} {
		for _, pictures := range []int{1, 10, maxPictures(node)} {
			j := fullJoin(node, spec, pictures)
			size := encodedSize(t, j)
			if want := joinSize(spec, pictures, node); size > want {
				t.Errorf("spec of %d, %d pictures: %d bytes, estimated %d", spec, pictures, size, want)
			}
		}
	}
	if n := maxPictures(node); joinSize(0, n, node) > wire.MaxMessage || n < 300 {
		t.Errorf("at most %d pictures", n)
	}
}

// fullJoin is a join record whose numbers are as large as they get.
func fullJoin(node string, spec, pictures int) *wire.Join {
	h := mem.Handle{Node: node, Object: math.MaxUint64, Generation: math.MaxUint64, Kind: mem.KindMM, NPU: math.MaxInt16,
		Bytes: math.MaxInt64, Shape: []int{math.MaxInt64, math.MaxInt64, math.MaxInt64}, Sealed: true, CRC: math.MaxUint32,
		Capability: make([]byte, 16)}
	j := &wire.Join{Prefill: wire.Prefill{
		Request: wire.Request{ID: newID(), Attempt: math.MaxInt32, Gateway: strings.Repeat("g", 64), Left: math.MaxInt64},
		Inline:  make([]byte, spec),
		Spec:    &h,
		Place: wire.Place{Tenant: strings.Repeat("t", maxTenant), Weight: math.MaxFloat64, Priority: math.MaxInt32,
			Waited: math.MaxInt64, Target: true, Left: math.MaxInt64},
	}}
	for range pictures {
		j.Prefill.MM = append(j.Prefill.MM, h)
		j.Have = append(j.Have, true)
	}
	return j
}

// encodedSize is the size of a message without the limit that wire.Marshal has.
func encodedSize(t *testing.T, m any) int {
	b, err := msgpack.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return len(b) + 1
}
