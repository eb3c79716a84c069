package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/nats-io/nats.go"
	"github.com/openai/openai-go/v3"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/kv"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/wire"
)

// A 10-picture request: no message on NATS is over 64 KiB, none carries a picture, and the decoder maps the very pages
// that prefill wrote.
func TestTenPicturesTravelByHandle(t *testing.T) {
	t.Parallel()
	if os.Getenv(domainsVariable) == "per-npu" {
		t.Skip("SKIPPED: between memory domains nothing is mapped; TestDomainsPerNPU asks about ten pictures")
	}
	c := start(t, append(eachStep(t, 10), "--topology", "3E1P1D")...) // the sequence is there for half a minute
	nc, err := nats.Connect("nats://" + c.nats)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	var messages, largest atomic.Int64
	decode := make(chan wire.Decode, 1)
	_, err = nc.Subscribe(">", func(m *nats.Msg) {
		messages.Add(1)
		size := int64(len(m.Data))
		for {
			old := largest.Load()
			if size <= old || largest.CompareAndSwap(old, size) {
				break
			}
		}
		if strings.HasPrefix(m.Subject, "trireme.decode.") {
			var d wire.Decode
			if err := wire.Unmarshal(m.Data, &d); err != nil {
				t.Errorf("decode message: %v", err)
				return
			}
			select {
			case decode <- d:
			default:
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}

	var g goldenCase
	for _, x := range loadGoldens(t) {
		if len(x.Images) == 10 {
			g = x
		}
	}
	p := g.params(t)
	p.MaxTokens = openai.Int(3000)
	p.SetExtraFields(map[string]any{"ignore_eos": true})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	answer := make(chan streamed, 1)
	go func() {
		s, _ := c.stream(ctx, p, nil) // cancelled below
		answer <- s
	}()

	var d wire.Decode
	select {
	case d = <-decode:
	case <-time.After(time.Minute):
		t.Fatal("no decode message")
	}
	socket := filepath.Join(c.data, "hmm.sock")
	client, err := hbm.Dial(t.Context(), socket, hbm.Hello{Instance: "test", Role: "decode"})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	logs, err := client.Attach(t.Context(), mem.ReadWrite, -1, d.Log)
	if err != nil {
		t.Fatal(err)
	}
	log, err := kv.OpenLog(logs[0].Bytes())
	if err != nil {
		t.Fatal(err)
	}
	if log.Shape().Prompt != len(g.InputIDs) {
		t.Errorf("the log is of a prompt of %d tokens, want %d", log.Shape().Prompt, len(g.InputIDs))
	}
	// The log, written by prefill, names the slabs that prefill wrote. Find the file pages behind them through this
	// process' own map, and wait until the decoder maps the same pages of the same file.
	for i := range log.SlabCount() {
		h, _, err := log.Slab(i)
		if err != nil {
			t.Fatal(err)
		}
		h.Node = d.Log.Node
		slab, err := client.Attach(t.Context(), mem.ReadWrite, -1, h)
		if err != nil {
			t.Fatal(err)
		}
		bytes := slab[0].Bytes()
		mine, ok := backing(t, os.Getpid(), uintptr(unsafe.Pointer(&bytes[0])))
		if !ok {
			t.Fatalf("slab %d is not in this process' map", i)
		}
		decoder := c.pid(t, "decoder")
		deadline := time.Now().Add(30 * time.Second)
		for !maps(t, decoder, mine) {
			if time.Now().After(deadline) {
				t.Fatalf("the decoder does not map slab %d (inode %d, offset %d)", i, mine.inode, mine.offset)
			}
			time.Sleep(time.Millisecond)
		}
	}
	cancel()
	<-answer
	if n := largest.Load(); n > wire.MaxMessage {
		t.Errorf("a message of %d bytes went over NATS, the limit is %d", n, wire.MaxMessage)
	}
	if messages.Load() < 12 {
		t.Errorf("only %d messages seen: the test listens in the wrong place", messages.Load())
	}
	t.Logf("%d messages, the largest %d bytes", messages.Load(), largest.Load())
}

// place is a page of a file.
type place struct {
	inode, offset uint64
}

// region is one line of /proc/PID/maps.
type region struct {
	from, to, offset, inode uint64
	access                  string
}

func regions(tb testing.TB, pid int) []region {
	tb.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	var found []region
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		span := strings.SplitN(fields[0], "-", 2)
		var r region
		r.from, _ = strconv.ParseUint(span[0], 16, 64)
		r.to, _ = strconv.ParseUint(span[1], 16, 64)
		r.offset, _ = strconv.ParseUint(fields[2], 16, 64)
		r.inode, _ = strconv.ParseUint(fields[4], 10, 64)
		r.access = fields[1]
		found = append(found, r)
	}
	return found
}

// backing is the file page behind an address of a process.
func backing(tb testing.TB, pid int, addr uintptr) (place, bool) {
	for _, r := range regions(tb, pid) {
		if uint64(addr) >= r.from && uint64(addr) < r.to && r.inode != 0 {
			return place{r.inode, r.offset + uint64(addr) - r.from}, true
		}
	}
	return place{}, false
}

// maps reports whether a process has a page of a file mapped for writing.
func maps(tb testing.TB, pid int, p place) bool {
	for _, r := range regions(tb, pid) {
		if r.inode == p.inode && p.offset >= r.offset && p.offset < r.offset+r.to-r.from && strings.HasPrefix(r.access, "rw") {
			return true
		}
	}
	return false
}

// A stage that is killed in the middle costs nobody anything: the answer is complete and the same.
func TestKilledStagesAreSucceeded(t *testing.T) {
	t.Parallel()
	c := start(t)
	p := mixed(t, 4) // four pictures
	p.MaxTokens = openai.Int(400)
	p.SetExtraFields(map[string]any{"ignore_eos": true})
	want, err := c.stream(t.Context(), p, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("decoder", func(t *testing.T) {
		got, err := c.stream(t.Context(), p, func(n int) {
			if n == 30 || n == 90 {
				kill(t, c.pid(t, "decoder"))
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if got.text != want.text || got.usage.TotalTokens != want.usage.TotalTokens {
			t.Errorf("after kills %q (%d tokens), undisturbed %q (%d)", got.text, got.usage.TotalTokens, want.text, want.usage.TotalTokens)
		}
	})
	for _, role := range []string{"encoder", "prefill"} {
		t.Run(role, func(t *testing.T) {
			c.waitReady(t)
			kill(t, c.pid(t, role)) // the request meets a stage that is just coming back
			got, err := c.stream(t.Context(), p, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got.text != want.text {
				t.Errorf("after the kill %q, undisturbed %q", got.text, want.text)
			}
		})
	}
	t.Run("hmm", func(t *testing.T) {
		c.waitReady(t)
		got, err := c.stream(t.Context(), p, func(n int) {
			if n == 30 {
				kill(t, c.pid(t, "hmm"))
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		if got.text != want.text {
			t.Errorf("after the HMM's death %q, undisturbed %q", got.text, want.text)
		}
	})
	c.waitReady(t)
	c.expectNoMemory(t)
}

func kill(tb testing.TB, pid int) {
	tb.Helper()
	if pid <= 0 {
		return // said already
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		tb.Errorf("killing %d: %v", pid, err)
	}
}

// A client that goes away frees everything.
func TestCancelFreesMemory(t *testing.T) {
	t.Parallel()
	c := start(t)
	p := mixed(t, 2)
	p.MaxTokens = openai.Int(4000)
	p.SetExtraFields(map[string]any{"ignore_eos": true})
	ctx, cancel := context.WithCancel(t.Context())
	_, err := c.stream(ctx, p, func(n int) {
		if n == 10 {
			cancel()
		}
	})
	if err == nil {
		t.Error("the cancelled stream ended without an error")
	}
	c.expectNoMemory(t)
}

// memory is what the HMM says of its memory.
func (c *cluster) memory(tb testing.TB) hbm.Stats {
	tb.Helper()
	client, err := hbm.Dial(tb.Context(), filepath.Join(c.data, "hmm.sock"), hbm.Hello{Instance: "test-stats", Role: "gateway"})
	if err != nil {
		tb.Fatal(err)
	}
	defer client.Close()
	stats, err := client.Stats(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	return stats
}

// expectNoMemory waits until no object is left in the HMM but what only a cache keeps.
func (c *cluster) expectNoMemory(tb testing.TB) {
	tb.Helper()
	c.expectMemory(tb, "nothing but what the caches keep", nothing)
}

// nothing is left but what only a cache keeps.
func nothing(s hbm.Stats) bool { return s.Objects == s.Resting && s.Claims == 0 }

// expectMemory waits until the HMM's memory is as ok wants it: less than the 30 s after which messages come again, by which what was forgotten
// would be found.
func (c *cluster) expectMemory(tb testing.TB, what string, ok func(hbm.Stats) bool) {
	tb.Helper()
	c.expectWithin(tb, 25*time.Second, what, ok)
}

// expectWithin is expectMemory for what may take longer.
func (c *cluster) expectWithin(tb testing.TB, limit time.Duration, what string, ok func(hbm.Stats) bool) {
	tb.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		stats := c.memory(tb)
		if ok(stats) {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("%v after the last request the HMM has not %s: %+v", limit, what, stats)
		}
	}
}

// Bad requests get an error that says what is wrong, and the service goes on.
func TestBadRequests(t *testing.T) {
	t.Parallel()
	c := start(t)
	chat := func(content string) string {
		return `{"messages":[{"role":"user","content":` + content + `}]}`
	}
	picture := func(url string) string {
		return chat(`[{"type":"image_url","image_url":{"url":"` + url + `"}},{"type":"text","text":"Describe the image."}]`)
	}
	truncated := dataURL(t, filepath.Join(golden, "case03_0.png"))
	truncated = truncated[:len(truncated)/8*4] // its header is whole: only the encoder can tell
	for name, x := range map[string]struct {
		body   string
		status int
		say    string
	}{
		"truncated picture": {picture(truncated), 400, "image_url"},
		"no picture":        {picture("data:image/png;base64,aGVsbG8="), 400, "messages"},
		"loopback":          {picture(c.url + "/health"), 400, "messages"},
		"metadata address":  {picture("http://169.254.169.254/latest"), 400, "messages"},
		"file":              {picture("file:///etc/passwd"), 400, "messages"},
		"unknown model":     {`{"model":"gpt","messages":[{"role":"user","content":"hi"}]}`, 404, "gpt"},
		"no messages":       {`{"messages":[]}`, 400, "messages"},
		"not JSON":          {`{"messages":`, 400, "JSON"},
	} {
		status, body := c.post(t, "/v1/chat/completions", x.body)
		if status != x.status || !strings.Contains(body, x.say) || !strings.Contains(body, `"error"`) {
			t.Errorf("%s: %d %s, want %d and %q", name, status, body, x.status, x.say)
		}
	}
	resp, err := http.Post(c.url+"/v1/chat/completions", "application/json", strings.NewReader(chat(`"Hello!"`)))
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("a good request after the bad ones: %v %v", resp, err)
	}
	resp.Body.Close()
	c.expectNoMemory(t)
}
