package wire_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

var rewrite = flag.Bool("rewrite", false, "write testdata/*.golden anew: they fix the wire format, so say why in the commit")

// same compares messages; the field that only tells msgpack how to encode is left out.
var same = cmp.Options{cmpopts.EquateEmpty(), cmp.FilterPath(func(p cmp.Path) bool {
	return strings.HasSuffix(p.String(), "_msgpack")
}, cmp.Ignore())}

func handle(i int) mem.Handle {
	return mem.Handle{
		Node: "node-1", Object: uint64(i), Generation: 77, Kind: mem.KindMM, NPU: -1, Bytes: 4096, Shape: []int{4, 9, 256},
		Sealed: true, CRC: 0xdeadbeef, Capability: []byte("0123456789abcdef"),
	}
}

// messages is one of each kind, every field set.
func messages() map[string]any {
	req := wire.Request{ID: "C994PusI7lpuROgi4cfBBR", Attempt: 2, Gateway: "gateway-1", Left: 90 * time.Second}
	spec := mem.Handle{Node: "node-1", Object: 3, Generation: 4, Kind: mem.KindSpec, NPU: -1, Bytes: 9, Capability: []byte("c")}
	lp := []wire.Logprob{{Own: -0.5, IDs: []int32{5, 6}, Top: []float32{-0.5, -1.5}}}
	prefill := wire.Prefill{Request: req, Inline: []byte{1, 2, 3}, Spec: &spec, MM: []mem.Handle{handle(1)}, Hits: 1,
		Place: wire.Place{Tenant: "tenant", Weight: 2.5, Priority: -3, Waited: 20 * time.Millisecond, Target: true, Left: -time.Second}}
	return map[string]any{
		"spec": &wire.Spec{
			Model: [32]byte{1, 2}, Prompt: []int32{1, 100, 70000}, Pictures: []wire.Picture{{Offset: 4, Grid: [3]int{1, 12, 12}, Content: [32]byte{9}}},
			Sampling: wire.Sampling{
				MaxTokens: 100, MinTokens: 1, Temperature: 0.5, TopP: 0.9, TopK: 20, MinP: 0.1, Seed: 1 << 60, Presence: 0.1,
				Frequency: 0.2, Repetition: 1.1, Stop: []int32{621, 619}, Logprobs: 3,
			},
			Choices: 2, Resume: [][]int32{{7, 8}, {}}, Salt: "tenant",
		},
		"encode":    &wire.Encode{Request: req, Part: 1, Pixels: handle(2), Grid: [3]int{1, 12, 4}, Content: [32]byte{8}, Model: [32]byte{1}, Salt: "tenant"},
		"prefill":   &prefill,
		"join":      &wire.Join{Prefill: prefill, Have: []bool{true, false}},
		"decode":    &wire.Decode{Request: req, Choice: 1, Inline: []byte{1}, Spec: &spec, Log: handle(5), RopeBase: -30},
		"tokens":    &wire.Tokens{Instance: "decode-1", Items: []wire.Run{{Request: req.ID, Attempt: 2, Choice: 1, Generation: 99, Index: 4, IDs: []int32{5, 1 << 20}, Logprobs: lp, Finish: wire.FinishStop, Cached: 16, Computed: 20, Pictures: 3, Hits: 2}}},
		"confirm":   &wire.Confirm{Instance: "decode-1", Request: req.ID, Attempt: 2, Choice: 1, Generation: 99, Next: 5, Finish: wire.FinishLength},
		"confirmed": &wire.Confirmed{Next: 5, Over: true, Ended: true},
		"resend":    &wire.Resend{Request: req.ID, Choice: 1, From: 3},
		"lost":      &wire.Lost{Request: req.ID, Attempt: 2, Why: "gone", Final: true, Status: 400, Param: "messages", NoRoom: true, Stage: "encode", Code: "x"},
		"done":      &wire.Done{Request: req.ID, Choice: -1},
		"gone":      &wire.Gone{Node: "node-1", Instance: "decode-1", Role: "decode"},
		"layout": &wire.Layout{
			Instance: "decode-1", Model: [32]byte{1}, Asked: 2, Epoch: 7, NPUs: []int{2, -1, 3}, Experts: []byte{0x80, 0x00, 0x82},
			Pending: &wire.Pending{ID: "a1", Kind: wire.ChangeScale, NPUs: 3, Left: time.Minute},
			Last:    &wire.Ended{ID: "a0", Kind: wire.ChangeRebalance, Committed: true, Why: "why"},
		},
		"change": &wire.Change{ID: "a1", Kind: wire.ChangeScale, NPUs: 4, Left: time.Minute, Rate: 1 << 30, Spare: 0.25, Slack: 0.05, DryRun: true, Seen: 3, Hold: "commit", HoldTime: time.Second, Join: []int{3}, Leave: []int{1, 2}, For: "decoder-1", By: -2},
	}
}

func encode(t testing.TB, m any) []byte {
	t.Helper()
	b, err := wire.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The bytes of every message are fixed: a running system may be a mix of builds.
func TestGoldenBytes(t *testing.T) {
	for name, m := range messages() {
		path := filepath.Join("testdata", name+".golden")
		got := []byte(hex.Dump(encode(t, m)))
		if *rewrite {
			if err := os.WriteFile(path, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: bytes changed (raise wire.Version, or only add fields at the end):\n%s\nwant\n%s", name, got, want)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	for name, m := range messages() {
		got := reflect.New(reflect.TypeOf(m).Elem()).Interface()
		if err := wire.Unmarshal(encode(t, m), got); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if d := cmp.Diff(m, got, same); d != "" {
			t.Errorf("%s came back different:\n%s", name, d)
		}
	}
}

// Any values come back as they were.
func TestRoundTripOfAny(t *testing.T) {
	t.Run("spec", roundTrip[wire.Spec])
	t.Run("encode", roundTrip[wire.Encode])
	t.Run("prefill", roundTrip[wire.Prefill])
	t.Run("join", roundTrip[wire.Join])
	t.Run("decode", roundTrip[wire.Decode])
	t.Run("tokens", func(t *testing.T) {
		roundTripOf(t, rapid.Custom(func(t *rapid.T) wire.Tokens { // Make would spend seconds on runs of runs
			return wire.Tokens{
				Instance: rapid.String().Draw(t, "instance"),
				Items:    rapid.SliceOfN(rapid.Make[wire.Run](), 0, 2).Draw(t, "items"),
			}
		}))
	})
	t.Run("confirm", roundTrip[wire.Confirm])
	t.Run("confirmed", roundTrip[wire.Confirmed])
	t.Run("resend", roundTrip[wire.Resend])
	t.Run("lost", roundTrip[wire.Lost])
	t.Run("done", roundTrip[wire.Done])
	t.Run("gone", roundTrip[wire.Gone])
	t.Run("stats", roundTrip[wire.Stats])
}

func roundTrip[M any](t *testing.T) { roundTripOf(t, rapid.Make[M]()) }

func roundTripOf[M any](t *testing.T, messages *rapid.Generator[M]) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		m := messages.Draw(t, "message")
		data, err := wire.Marshal(&m)
		if errors.Is(err, wire.ErrTooLarge) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		var got M
		if err := wire.Unmarshal(data, &got); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(&m, &got, same, cmpopts.EquateNaNs()); d != "" {
			t.Errorf("came back different:\n%s", d)
		}
		for _, cut := range []int{1, len(data) / 2, len(data) - 1} {
			if err := wire.Unmarshal(data[:cut], new(M)); !errors.Is(err, wire.ErrMalformed) {
				t.Errorf("cut to %d of %d bytes: %v", cut, len(data), err)
			}
		}
	})
}

func TestRefusals(t *testing.T) {
	good := encode(t, &wire.Done{Request: "x"})
	for name, x := range map[string]struct {
		data []byte
		want error
	}{
		"empty":                  {nil, wire.ErrMalformed},
		"other version":          {append([]byte{9}, good[1:]...), wire.ErrVersion},
		"cut":                    {good[:len(good)-1], wire.ErrMalformed},
		"more behind":            {append(append([]byte{}, good...), 1), wire.ErrMalformed},
		"wrong field":            {[]byte("\x01\x92\x01\xa1x"), wire.ErrMalformed},
		"promises four billions": {[]byte("\x01\x92\xa1x\xdd\xff\xff\xff\xff"), wire.ErrMalformed},
	} {
		var d wire.Done
		if err := wire.Unmarshal(x.data, &d); !errors.Is(err, x.want) {
			t.Errorf("%s: %v, want %v", name, err, x.want)
		}
	}
	var tokens wire.Tokens
	if err := wire.Unmarshal([]byte("\x01\x92\xa1x\xdd\xff\xff\xff\xff"), &tokens); !errors.Is(err, wire.ErrMalformed) {
		t.Errorf("tokens that promise four billion runs: %v", err)
	}
	if _, err := wire.Marshal(&wire.Lost{Why: strings.Repeat("x", wire.MaxMessage)}); !errors.Is(err, wire.ErrTooLarge) {
		t.Errorf("a message over the limit: %v", err)
	}
}

// The join record of many pictures fits a message, and a spec of any size can be encoded.
func TestSizes(t *testing.T) {
	j := wire.Join{Prefill: wire.Prefill{Request: wire.Request{ID: "C994PusI7lpuROgi4cfBBR", Gateway: "gateway-12345678"}}}
	for i := range 512 {
		j.Have = append(j.Have, true)
		h := handle(1 << 20)
		h.Object += uint64(i)
		h.Generation = 1 << 62
		j.Prefill.MM = append(j.Prefill.MM, h)
	}
	t.Logf("a join record of 512 pictures has %d bytes", len(encode(t, &j))) // Marshal refuses more than MaxMessage

	long := wire.Spec{Prompt: make([]int32, 300_000), Choices: 1}
	for i := range long.Prompt {
		long.Prompt[i] = int32(i)
	}
	data, err := wire.MarshalSpec(&long)
	if err != nil {
		t.Fatal(err)
	}
	var got wire.Spec
	if err := wire.Unmarshal(data, &got); err != nil || len(got.Prompt) != len(long.Prompt) || got.Prompt[299_999] != 299_999 {
		t.Errorf("a spec of %d bytes came back with %d tokens, %v", len(data), len(got.Prompt), err)
	}
}

func TestStageSubject(t *testing.T) {
	seen := map[string]bool{}
	for i := range 10_000 {
		seen[wire.StageSubject("decode", fmt.Sprint("request", i))] = true
	}
	if len(seen) != wire.Partitions {
		t.Errorf("10,000 requests fall into %d partitions, want all %d", len(seen), wire.Partitions)
	}
	if s := wire.StageSubject("encode", "a"); !strings.HasPrefix(s, "trireme.encode.p") || len(s) != len("trireme.encode.p00") {
		t.Errorf("subject is %s", s)
	}
}

func FuzzUnmarshal(f *testing.F) {
	for _, m := range messages() {
		f.Add(encode(f, m))
	}
	f.Add([]byte("\x01\x92\xa1x\xdd\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for name, m := range messages() {
			got := reflect.New(reflect.TypeOf(m).Elem()).Interface()
			if wire.Unmarshal(data, got) != nil {
				continue
			}
			again, err := wire.Marshal(got)
			if errors.Is(err, wire.ErrTooLarge) {
				continue
			}
			if err != nil {
				t.Errorf("%s: decoded but not encoded: %v", name, err)
			}
			back := reflect.New(reflect.TypeOf(m).Elem()).Interface()
			if err := wire.Unmarshal(again, back); err != nil {
				t.Errorf("%s: encoded but not decoded: %v", name, err)
			}
		}
	})
}

func BenchmarkTokens(b *testing.B) {
	m := &wire.Tokens{Instance: "decode-12345678"}
	for i := range 32 {
		m.Items = append(m.Items, wire.Run{Request: "C994PusI7lpuROgi4cfBBR", Attempt: 1, Generation: 1 << 50, Index: i, IDs: []int32{500}})
	}
	data := encode(b, m)
	b.Run("marshal", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			_, _ = wire.Marshal(m)
		}
	})
	b.Run("unmarshal", func(b *testing.B) {
		b.ReportAllocs()
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			var got wire.Tokens
			_ = wire.Unmarshal(data, &got)
		}
	})
}
