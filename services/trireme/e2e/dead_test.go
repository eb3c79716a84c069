package e2e

import (
	"bytes"
	"compress/zlib"
	"encoding/base64"
	bin "encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
	"golang.org/x/sys/unix"

	"trireme.dev/shared/wire"
)

// huge is a PNG of few bytes whose pixels take 256 MB: a red area of 8000 x 8000.
func huge(tb testing.TB) []byte {
	tb.Helper()
	const side = 8000
	var data bytes.Buffer
	z, err := zlib.NewWriterLevel(&data, zlib.BestSpeed)
	if err != nil {
		tb.Fatal(err)
	}
	row := append([]byte{0}, bytes.Repeat([]byte{200, 30, 30}, side)...) // no filter, then RGB
	for range side {
		if _, err := z.Write(row); err != nil {
			tb.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		tb.Fatal(err)
	}
	out := []byte("\x89PNG\r\n\x1a\n")
	chunk := func(kind string, data []byte) {
		out = bin.BigEndian.AppendUint32(out, uint32(len(data)))
		sum := append([]byte(kind), data...)
		out = append(out, sum...)
		out = bin.BigEndian.AppendUint32(out, crc32.ChecksumIEEE(sum))
	}
	header := bin.BigEndian.AppendUint32(bin.BigEndian.AppendUint32(nil, side), side)
	chunk("IHDR", append(header, 8, 2, 0, 0, 0)) // 8 bits, RGB
	chunk("IDAT", data.Bytes())
	chunk("IEND", nil)
	return out
}

// limit bounds the address space of up, so that of children which it starts from now on, and of its encoders.
func (c *cluster) limit(tb testing.TB, bytes uint64) {
	tb.Helper()
	l := unix.Rlimit{Cur: bytes, Max: unix.RLIM_INFINITY}
	pids := []int{c.cmd.Process.Pid}
	for _, p := range c.children() {
		if p.role == "encoder" {
			pids = append(pids, p.pid)
		}
	}
	for _, pid := range pids {
		if err := unix.Prlimit(pid, unix.RLIMIT_AS, &l, nil); err != nil {
			tb.Fatal(err)
		}
	}
}

// mapped is the most bytes of address space that an encoder has.
func (c *cluster) mapped(tb testing.TB) (most uint64) {
	tb.Helper()
	for _, p := range c.children() {
		if p.role != "encoder" {
			continue
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
		if err != nil {
			tb.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(status), "VmSize:")
		var kib uint64
		if _, err := fmt.Sscan(rest, &kib); err != nil {
			tb.Fatal(err)
		}
		most = max(most, kib<<10)
	}
	return most
}

// dead runs `trireme dead`.
func (c *cluster) dead(tb testing.TB, args ...string) (out string, err error) {
	tb.Helper()
	path, err := binary()
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(path, append(append([]string{"dead"}, args...), "--nats-url", "nats://"+c.nats)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err = cmd.Run(); err != nil {
		err = fmt.Errorf("%w: %s", err, &stderr)
	}
	return stdout.String(), err
}

// letters is `trireme dead list --json`.
func (c *cluster) letters(tb testing.TB, args ...string) (letters []wire.DeadLetter) {
	tb.Helper()
	out, err := c.dead(tb, append([]string{"list", "--json"}, args...)...)
	if err != nil {
		tb.Fatal(err)
	}
	var list struct{ Letters []wire.DeadLetter }
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		tb.Fatal(err)
	}
	return list.Letters
}

// eventually waits until something is so.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("after a minute still not: %s", what)
		}
	}
}

// A picture that brings down every encoder that decodes it, for want of memory, is quarantined after four of them, while the
// others go on with what others ask. It is a dead letter, which can be looked at and replayed: when there is enough memory, the answer is
// the one that the request would have had, although its picture is nowhere else any more.
func TestQuarantineAndReplay(t *testing.T) {
	t.Parallel()
	picture := huge(t)
	site := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(picture) }))
	defer site.Close()
	// On two processors: by how much encoders differ in what they have when they have just begun grows with their number, on 16 to 200 MB.
	c := startWith(t, []string{"GOMAXPROCS=2"}, "--topology", "3E1P1D", "--threads", "2", "--allow-media-host", "127.0.0.1")

	// As it is now, so will it be when it is started again; one that has worked has up to 75 MB more, which would nearly do for the picture.
	fresh := c.mapped(t)
	ask := make([]openai.ChatCompletionNewParams, 4)
	want := make([]streamed, len(ask))
	for i := range ask {
		ask[i] = mixed(t, 1+i) // with as many pictures
		ask[i].Seed = openai.Int(7)
		var err error
		if want[i], err = c.stream(t.Context(), ask[i], nil); err != nil {
			t.Fatal(err)
		}
	}
	c.limit(t, fresh+160<<20)
	var others sync.WaitGroup
	var stop atomic.Bool
	var answers atomic.Int64
	for i := range ask {
		others.Go(func() {
			for n := 0; !stop.Load(); n++ {
				p := ask[i]
				p.SetExtraFields(map[string]any{"cache_salt": fmt.Sprint("salt", i, n)}) // lest no picture is encoded again
				got, err := c.stream(t.Context(), p, nil)
				if err != nil || got.text != want[i].text {
					t.Errorf("another request got %q, %v; undisturbed %q", got.text, err, want[i].text)
					return
				}
				answers.Add(1)
			}
		})
	}
	post := func(url, extra string) (int, []byte) {
		t.Helper()
		body := `{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"` + url + `"}},
			{"type":"text","text":"Describe the image."}]}],"max_tokens":40,"temperature":1,"user":"search"` + extra + `}`
		resp, err := http.Post(c.url+"/v1/chat/completions", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, text
	}
	crashes := func() int { return strings.Count(c.log.String(), "runtime: out of memory: cannot allocate") }
	status, text := post(site.URL+"/huge.png", "")
	if status != 500 || !bytes.Contains(text, []byte(wire.CodeQuarantined)) {
		t.Fatalf("the request that kills got %d %s", status, text)
	}
	eventually(t, "four encoders have said why they end", func() bool { return crashes() >= 4 })
	if n := crashes(); n != 4 {
		t.Errorf("%d encoders ran out of memory, want 4", n)
	}
	var first wire.DeadLetter
	eventually(t, "it is a dead letter", func() bool {
		if l := c.letters(t, "--tenant", "search"); len(l) == 1 {
			first = l[0]
		}
		return first.ID != ""
	})
	if first.Reason != wire.DeadQuarantined || first.Stage != "encode" || first.Seed == 0 || first.Body == 0 || len(first.Fetched) != 1 ||
		first.Fetched[0].Bytes != int64(len(picture)) || first.Trace == "" {
		t.Errorf("letter %+v", first)
	}
	site.Close()

	// The cause is still there: it is quarantined again, which makes another letter that tells so.
	if out, err := c.dead(t, "replay", first.ID, "--url", c.url); err == nil || !strings.Contains(err.Error(), "failed again") {
		t.Errorf("replayed with too little memory: %q, %v", out, err)
	}
	eventually(t, "there is a second letter", func() bool { return len(c.letters(t)) == 2 })
	second := c.letters(t, "--limit", "1")[0]
	if second.ReplayOf != first.ID || second.Seed != 0 || len(second.Fetched) != 0 || second.Tenant != "search" {
		t.Errorf("letter of the replay %+v", second)
	}
	eventually(t, "both dead letters are counted", func() bool { return c.metric(t, "trireme_dead_letters_total") == 2 })
	before := answers.Load()
	eventually(t, "the others go on", func() bool { return answers.Load() > before || t.Failed() })
	stop.Store(true)
	others.Wait()

	c.limit(t, unix.RLIM_INFINITY)
	status, text = post("data:image/png;base64,"+base64.StdEncoding.EncodeToString(picture), fmt.Sprintf(`,"seed":%d,"cache_salt":"own"`, first.Seed))
	var reference openai.ChatCompletion
	if err := json.Unmarshal(text, &reference); err != nil || status != 200 {
		t.Fatalf("with enough memory: %d %s", status, text)
	}
	for _, id := range []string{first.ID, second.ID} {
		out, err := c.dead(t, "replay", id, "--url", c.url)
		if want := reference.Choices[0].Message.Content + "\n"; err != nil || out != want {
			t.Errorf("the replay got %q, %v; want %q", out, err, want)
		}
	}
	if out, err := c.dead(t, "show", second.ID); err != nil || !strings.Contains(out, first.ID) || !strings.Contains(out, wire.CodeQuarantined) {
		t.Errorf("show: %s, %v", out, err)
	}
	if out, err := c.dead(t, "show", first.ID, "--body"); err != nil || !strings.Contains(out, site.URL+"/huge.png") {
		t.Errorf("show --body: %s, %v", out, err)
	}
	if got := c.status(t)["dead_letters"]; got != 2.0 {
		t.Errorf("status shows %v dead letters", got)
	}
	if out, err := c.dead(t, "purge", first.ID); err != nil || out != "1 deleted\n" {
		t.Errorf("purge: %q, %v", out, err)
	}
	if _, err := c.dead(t, "replay", first.ID, "--url", c.url); err == nil || !strings.Contains(err.Error(), "no such dead letter") {
		t.Errorf("replay of a letter that was purged: %v", err)
	}
	if out, err := c.dead(t, "purge", "--all", "--tenant", "search"); err != nil || out != "1 deleted\n" {
		t.Errorf("purge: %q, %v", out, err)
	}
	if out, err := c.dead(t, "list"); err != nil || out != "no dead letters\n" {
		t.Errorf("list: %q, %v", out, err)
	}
}
