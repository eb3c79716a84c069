package protocol_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"trireme.dev/shared/hbm/protocol"
	"trireme.dev/shared/mem"
)

var handle = mem.Handle{
	Node: "n1", Object: 7, Generation: 1 << 60, Kind: mem.KindMM, NPU: 3, Bytes: 1 << 33, Shape: []int{4, 64, 256},
	Sealed: true, CRC: 0xfedcba98, Capability: bytes.Repeat([]byte{0xc1}, 16),
}

var ref = protocol.Ref{Request: "0123456789abcdefghijkl", Attempt: 2, Left: 90 * time.Second}

// bodies is one of each message, so that a round trip meets every field.
func bodies() []any {
	part := protocol.Part{Request: ref.Request, Attempt: 1, Stage: "decode", Part: 4, Left: time.Minute}
	return []any{
		&protocol.Hello{Version: 1, Instance: "i", Role: "decode", NPUs: 2, Name: "decoder-0", Want: []int{5, 0}},
		&protocol.Join{NPUs: 2, Want: []int{1, 3}},
		&protocol.Welcome{Version: 1, Node: "n", NPUs: []int{0, 5}, Slots: 9, Spaces: []protocol.Space{{Page: 1, Bytes: 2}}},
		&[]protocol.Spec{{Kind: mem.KindKV, NPU: -1, Bytes: 5, Shape: []int{5}, Ref: ref}},
		&[]protocol.Grant{{Handle: handle, Extent: mem.Extent{Space: 1, Offset: 1 << 40, Bytes: 65536}}},
		&protocol.Attach{Access: mem.ReadWrite, NPU: 1, Handles: []mem.Handle{handle}},
		&protocol.Seal{Ref: ref, Items: []protocol.Sealing{{Object: protocol.Object{ID: 1, Generation: 2}, CRC: 3}}},
		&protocol.Keep{Ref: ref, Objects: []protocol.Object{{ID: 1, Generation: 2}}},
		&protocol.Claim{Part: part, Reply: "$JS.ACK.x"},
		&protocol.Claimed{Generation: 1 << 63, Slot: 5},
		&protocol.Unclaim{Part: part, Generation: 8},
		&[]protocol.Orphan{{Part: part, Generation: 9, Reply: "r"}},
		&protocol.Stats{Node: "n", Memory: []protocol.NPUStats{{NPU: -1, Capacity: 4, Free: 3, Usage: protocol.Usage{Used: 1},
			Kinds: map[string]protocol.Usage{"kv": {Used: 1, Padded: 2, Peak: 3}}}}, Claims: 3,
			Weights: []protocol.WeightsStats{{Key: "ab", Domain: 1, Objects: 2, Bytes: 3, Loaded: 2, Wanted: 4, Holders: 1}}},
		&protocol.Weights{Key: protocol.Key{1, 2}, NPU: 3, Numbers: []int{6143, 6150}, Sizes: []int64{1, 1 << 33}, Most: 1 << 26, Need: 1 << 40,
			Wait: time.Second},
		&[]protocol.Placed{{State: protocol.PlacedFinal, Grant: &protocol.Grant{Handle: handle}, Check: true},
			{State: protocol.PlacedMake, Grant: &protocol.Grant{Handle: handle}, Source: &protocol.Grant{Handle: handle}}, {}},
	}
}

func TestRoundTrip(t *testing.T) {
	for _, want := range bodies() {
		p, err := protocol.Request(77, protocol.OpAlloc, want)
		if err != nil {
			t.Fatal(err)
		}
		payload, err := protocol.ReadFrame(bytes.NewReader(p))
		if err != nil {
			t.Fatal(err)
		}
		id, op, body, err := protocol.ParseRequest(payload)
		if err != nil || id != 77 || op != protocol.OpAlloc {
			t.Fatalf("ParseRequest = %d, %d, %v", id, op, err)
		}
		check(t, body, want)

		p, err = protocol.Reply(78, nil, want)
		if err != nil {
			t.Fatal(err)
		}
		id, body, failure, err := protocol.ParseReply(p[4:])
		if err != nil || failure != nil || id != 78 {
			t.Fatalf("ParseReply = %d, %v, %v", id, failure, err)
		}
		check(t, body, want)
	}
}

func check(t *testing.T, body []byte, want any) {
	t.Helper()
	got := newLike(want)
	if err := protocol.Decode(body, got); err != nil {
		t.Fatalf("%T: %v", want, err)
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(mem.Handle{})); diff != "" {
		t.Errorf("%T: (-want +got)\n%s", want, diff)
	}
}

func newLike(v any) any {
	switch v.(type) {
	case *protocol.Hello:
		return new(protocol.Hello)
	case *protocol.Join:
		return new(protocol.Join)
	case *protocol.Welcome:
		return new(protocol.Welcome)
	case *[]protocol.Spec:
		return new([]protocol.Spec)
	case *[]protocol.Grant:
		return new([]protocol.Grant)
	case *protocol.Attach:
		return new(protocol.Attach)
	case *protocol.Seal:
		return new(protocol.Seal)
	case *protocol.Keep:
		return new(protocol.Keep)
	case *protocol.Claim:
		return new(protocol.Claim)
	case *protocol.Claimed:
		return new(protocol.Claimed)
	case *protocol.Unclaim:
		return new(protocol.Unclaim)
	case *[]protocol.Orphan:
		return new([]protocol.Orphan)
	case *protocol.Stats:
		return new(protocol.Stats)
	case *protocol.Weights:
		return new(protocol.Weights)
	case *[]protocol.Placed:
		return new([]protocol.Placed)
	}
	panic(fmt.Sprintf("no message like %T", v))
}

func TestErrorsKeepTheirSentinelAndText(t *testing.T) {
	for _, sentinel := range []error{
		mem.ErrGone, mem.ErrDenied, mem.ErrExhausted, mem.ErrCorrupt, mem.ErrFenced, mem.ErrEnded, mem.ErrLost,
		mem.ErrSealed, mem.ErrInvalid, protocol.ErrVersion, protocol.ErrInternal,
	} {
		sent := fmt.Errorf("NPU 3 has 5 bytes: %w", sentinel)
		p, err := protocol.Reply(1, sent, []int{1})
		if err != nil {
			t.Fatal(err)
		}
		_, _, got, err := protocol.ParseReply(p[4:])
		if err != nil {
			t.Fatal(err)
		}
		if !errors.Is(got, sentinel) || got.Error() != sent.Error() {
			t.Errorf("%v arrived as %v", sent, got)
		}
	}
	p, err := protocol.Reply(1, errors.New(strings.Repeat("é", 5000)), nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _, got, err := protocol.ParseReply(p[4:])
	if err != nil || !errors.Is(got, protocol.ErrInternal) || len(got.Error()) > 1100 {
		t.Errorf("an unknown, long error arrived as %d bytes, %v", len(got.Error()), err)
	}
}

func TestReadFrame(t *testing.T) {
	for name, tc := range map[string]struct {
		in   string
		want error
	}{
		"nothing":     {"", io.EOF},
		"half a head": {"\x00\x00", io.ErrUnexpectedEOF},
		"half a body": {"\x00\x00\x00\x05abc", io.ErrUnexpectedEOF},
		"no body":     {"\x00\x00\x00\x05", io.ErrUnexpectedEOF},
		"too long":    {"\x00\x10\x00\x01", protocol.ErrFrame},
		"garbage":     {"GET / HTTP/1.1\r\n", protocol.ErrFrame},
	} {
		if _, err := protocol.ReadFrame(strings.NewReader(tc.in)); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
}

func TestTooLargeToSend(t *testing.T) {
	if _, err := protocol.Request(1, protocol.OpEnd, strings.Repeat("x", protocol.MaxFrame)); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("a frame over MaxFrame: %v", err)
	}
}

// TestBatchFits shows that MaxBatch objects fit into a frame in every message, whatever their numbers are.
func TestBatchFits(t *testing.T) {
	h := handle
	h.Node, h.Object, h.Shape = strings.Repeat("n", 64), 1<<63, []int{1 << 40, 1 << 40, 1 << 40, 1 << 40}
	grants := make([]protocol.Grant, protocol.MaxBatch)
	specs := make([]protocol.Spec, protocol.MaxBatch)
	for i := range grants {
		grants[i] = protocol.Grant{Handle: h, Extent: mem.Extent{Space: 1000, Offset: 1 << 60, Bytes: 1 << 60}}
		specs[i] = protocol.Spec{Kind: 200, NPU: 1 << 20, Bytes: 1 << 60, Shape: h.Shape, Ref: protocol.Ref{
			Request: strings.Repeat("r", 128), Attempt: 1 << 30, Left: 1 << 60}}
	}
	if _, err := protocol.Reply(1<<63, nil, grants); err != nil {
		t.Error(err)
	}
	if _, err := protocol.Request(1<<63, protocol.OpAlloc, specs); err != nil {
		t.Error(err)
	}
}

func TestCheckRefuses(t *testing.T) {
	for name, p := range map[string]string{
		"empty":            "",
		"cut":              "\x93\x01",
		"trailing":         "\x93\x01\x02\xc0\xc0",
		"huge array":       "\x93\x01\x02\xdd\xff\xff\xff\xff",
		"huge map":         "\x93\x01\x02\xdf\x80\x00\x00\x00",
		"huge string":      "\x93\x01\x02\xdb\xff\xff\xff\xff",
		"many elements":    "\x93\x01\x02\xdc\xff\xff" + strings.Repeat("\xc0", 65535),
		"deep":             "\x93\x01\x02" + strings.Repeat("\x91", 1000) + "\xc0",
		"extension":        "\x93\x01\x02\xd4\x01\x01",
		"no array":         "\x01",
		"two parts":        "\x92\x01\x02",
		"id not a number":  "\x93\xc0\xa1x\xc0",
		"op not a number":  "\x93\x01\xa1x\xc0",
		"reserved format":  "\x93\x01\x02\xc1",
		"text that is cut": "\x93\x01\x02\xd9\x05ab",
	} {
		if _, _, _, err := protocol.ParseRequest([]byte(p)); !errors.Is(err, protocol.ErrFrame) {
			t.Errorf("%s: %v, want ErrFrame", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, b := range bodies() {
		if p, err := protocol.Request(1, protocol.OpSeal, b); err == nil {
			f.Add(p[4:])
		}
		if p, err := protocol.Reply(1, mem.ErrGone, b); err == nil {
			f.Add(p[4:])
		}
	}
	f.Add([]byte("\x93\x01\x02\xdd\xff\xff\xff\xff"))     // a body that claims to be a huge array
	f.Add([]byte("\x93\x01\x02\xdf\xff\xff\xff\xff\xa1")) // or a huge map
	f.Fuzz(func(t *testing.T, p []byte) {
		if _, _, body, err := protocol.ParseRequest(p); err == nil {
			for _, b := range bodies() {
				_ = protocol.Decode(body, newLike(b)) // must not panic, nor take memory out of proportion
			}
		} else if !errors.Is(err, protocol.ErrFrame) {
			t.Errorf("ParseRequest: %v", err)
		}
		if _, _, _, err := protocol.ParseReply(p); err != nil && !errors.Is(err, protocol.ErrFrame) {
			t.Errorf("ParseReply: %v", err)
		}
	})
}

func BenchmarkRoundTrip(b *testing.B) {
	p, err := protocol.Request(1, protocol.OpAttach, protocol.Attach{Handles: []mem.Handle{handle}})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := protocol.Request(1, protocol.OpAttach, protocol.Attach{Handles: []mem.Handle{handle}}); err != nil {
			b.Fatal(err)
		}
		_, _, body, err := protocol.ParseRequest(p[4:])
		if err != nil {
			b.Fatal(err)
		}
		var a protocol.Attach
		if err := protocol.Decode(body, &a); err != nil {
			b.Fatal(err)
		}
	}
}
