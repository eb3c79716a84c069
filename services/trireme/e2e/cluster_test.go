// Package e2e tests the whole program: the real binary, its processes, a real nats-server, mapped memory, and the
// official OpenAI client in front.
package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"

	"trireme.dev/shared/bus/bustest"
)

const (
	root   = "../../.."
	golden = root + "/shared/testdata/golden/shapes-vl-moe"
)

// binaryDir is the folder that binary makes, removed when all tests are over: a binary has a hundred megabytes.
var binaryDir string

func TestMain(m *testing.M) {
	bustest.ServeIfAsked()
	runIfDoomed()
	sideBySide()
	status := m.Run()
	if err := os.RemoveAll(binaryDir); err != nil {
		fmt.Fprintln(os.Stderr, "removing the binary of the tests:", err)
		status = 1
	}
	os.Exit(status)
}

// sideBySide has more tests run at once than there are processors, unless -parallel says how many: each has a fleet of its own, ports of
// its own and a folder of its own, and most of the time they all wait, for a lease to end, a process to come back or a paced NPU. A fleet has up
// to a gigabyte of memory.
func sideBySide() {
	flag.Parse()
	said := false
	flag.Visit(func(f *flag.Flag) { said = said || f.Name == "test.parallel" })
	if !said {
		_ = flag.Set("test.parallel", strconv.Itoa(3*runtime.GOMAXPROCS(0))) // a flag of testing's
	}
}

// binaryVariable names a program that is there already, for machines without Go and for testing what is released.
const binaryVariable = "TRIREME_E2E_BINARY"

// binary builds the program once for all tests.
var binary = sync.OnceValues(func() (string, error) {
	if path := os.Getenv(binaryVariable); path != "" {
		return filepath.Abs(path)
	}
	var err error
	if binaryDir, err = os.MkdirTemp("", "trireme-e2e-"); err != nil {
		return "", err
	}
	path := filepath.Join(binaryDir, "trireme")
	out, err := exec.Command("go", "build", "-o", path, root+"/services/trireme").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building the binary: %w\n%s", err, out)
	}
	return path, nil
})

// cluster is a running `trireme up`.
type cluster struct {
	url, nats string
	data      string
	cmd       *exec.Cmd
	log       *syncBuffer
	exited    chan struct{}
	killed    bool // by the test: it need not stop in order
}

// syncBuffer collects output of a process while tests read it.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// domainsVariable sets --domains of all clusters that do not say it themselves.
const domainsVariable = "TRIREME_E2E_DOMAINS"

// lastPort is the last one that freePort has given.
var lastPort atomic.Int32

func init() { lastPort.Store(int32(20_000 + os.Getpid()%100*100)) }

// freePort is a port that nobody listens on and that no other test gets: not one of those from 32768 on, which the system gives to anybody who
// asks for any, and would before it is used.
func freePort(tb testing.TB) int {
	tb.Helper()
	for {
		port := int(lastPort.Add(1))
		if port >= 32_768 {
			tb.Fatal("no free port below 32768")
		}
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			l.Close()
			return port
		}
	}
}

// start runs `trireme up` on free ports and waits until it is ready. The test's end stops it with Ctrl-C and checks
// that it stops in order.
func start(tb testing.TB, args ...string) *cluster {
	tb.Helper()
	return startWith(tb, nil, args...)
}

// startWith is start with more in the environment, as "NAME=value".
func startWith(tb testing.TB, env []string, args ...string) *cluster {
	tb.Helper()
	path, err := binary()
	if err != nil {
		tb.Fatal(err)
	}
	if domains := os.Getenv(domainsVariable); domains != "" {
		args = append([]string{"--domains", domains}, args...)
	}
	c := &cluster{data: tb.TempDir(), log: &syncBuffer{}, exited: make(chan struct{})}
	c.nats = fmt.Sprintf("127.0.0.1:%d", freePort(tb))
	// With port 0 up would take any, and have it free again until the gateway listens, and whenever that is killed.
	c.cmd = exec.Command(path, append([]string{
		"up", "--http", fmt.Sprintf("127.0.0.1:%d", freePort(tb)), "--nats", c.nats, "--monitor", "127.0.0.1:0", "--data", c.data,
	}, args...)...)
	c.cmd.Env = append(os.Environ(), env...)
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL} // it ends with the tests, however they do
	c.cmd.Stderr = c.log
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	ready := make(chan string, 1)
	go func() {
		defer close(c.exited)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if u, ok := strings.CutPrefix(lines.Text(), "ready "); ok {
				ready <- u
			}
		}
		_ = c.cmd.Wait()
	}()
	tb.Cleanup(func() { c.stop(tb) })
	select {
	case c.url = <-ready:
	case <-c.exited:
		tb.Fatalf("up ended before it was ready:\n%s", c.log)
	case <-time.After(2 * time.Minute):
		tb.Fatalf("up is not ready after two minutes:\n%s", c.log)
	}
	return c
}

func (c *cluster) stop(tb testing.TB) {
	tb.Helper()
	if c.killed {
		return
	}
	children := c.children()
	_ = c.cmd.Process.Signal(os.Interrupt)
	select {
	case <-c.exited:
	case <-time.After(time.Minute):
		_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
		<-c.exited
		tb.Errorf("up did not stop within a minute of Ctrl-C:\n%s", c.log)
	}
	if code := c.cmd.ProcessState.ExitCode(); code != 0 {
		tb.Errorf("up exited with %d:\n%s", code, c.log)
	}
	for _, p := range children {
		if syscall.Kill(p.pid, 0) == nil {
			tb.Errorf("child %d (%s) outlived up", p.pid, p.role)
		}
	}
	if tb.Failed() {
		tb.Logf("output of up:\n%s", c.log)
	}
}

type process struct {
	pid  int
	role string // the subcommand
}

// children lists the direct children of up.
func (c *cluster) children() []process {
	var found []process
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if fields[1] != strconv.Itoa(c.cmd.Process.Pid) {
			continue
		}
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if args := strings.Split(string(line), "\x00"); len(args) > 1 {
			found = append(found, process{pid, args[1]})
		}
	}
	return found
}

// pid is the process id of the child that runs a service, waited for when it is just being started again.
func (c *cluster) pid(tb testing.TB, role string) int {
	tb.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		for _, p := range c.children() {
			if p.role == role {
				return p.pid
			}
		}
	}
	tb.Errorf("no child runs %s", role)
	return 0
}

// waitReady waits until /health is 200 again.
func (c *cluster) waitReady(tb testing.TB) {
	tb.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		resp, err := http.Get(c.url + "/health")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return
			}
		}
		if time.Now().After(deadline) {
			tb.Fatalf("not healthy after a minute: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (c *cluster) client() openai.Client {
	return openai.NewClient(option.WithBaseURL(c.url+"/v1"), option.WithAPIKey("none"), option.WithMaxRetries(0),
		option.WithHTTPClient(http.DefaultClient)) // so that its idle connections can be closed
}

// status is `trireme status --json`.
func (c *cluster) status(tb testing.TB) map[string]any {
	tb.Helper()
	path, err := binary()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := exec.Command(path, "status", "--json", "--nats-url", "nats://"+c.nats).Output()
	if err != nil {
		tb.Fatalf("status: %v\n%s", err, out)
	}
	var m map[string]any
	if err := json.Unmarshal(out, &m); err != nil {
		tb.Fatalf("status --json is no JSON: %v\n%s", err, out)
	}
	return m
}

// goldenCase is one entry of cases.json.
type goldenCase struct {
	Name     string   `json:"name"`
	Images   []string `json:"images"`
	Messages []struct {
		Role    string `json:"role"`
		Content any    `json:"content"` // a string, or parts
	} `json:"messages"`
	InputIDs  []int64 `json:"input_ids"`
	OutputIDs []int64 `json:"output_ids"`
	Output    string  `json:"output_text"`
}

var goldens = sync.OnceValues(func() ([]goldenCase, error) {
	data, err := os.ReadFile(filepath.Join(golden, "cases.json"))
	if err != nil {
		return nil, err
	}
	var cases []goldenCase
	return cases, json.Unmarshal(data, &cases)
})

func loadGoldens(tb testing.TB) []goldenCase {
	tb.Helper()
	cases, err := goldens()
	if err != nil || len(cases) == 0 {
		tb.Fatalf("loading goldens: %d cases, %v", len(cases), err)
	}
	return cases
}

func dataURL(tb testing.TB, path string) string {
	tb.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	return "data:image/png;base64," + base64.StdEncoding.EncodeToString(data)
}

// params turns a golden case into a request of the official client.
func (g *goldenCase) params(tb testing.TB) openai.ChatCompletionNewParams {
	tb.Helper()
	p := openai.ChatCompletionNewParams{Model: "shapes-vl-moe"}
	next := 0
	for _, m := range g.Messages {
		var parts []openai.ChatCompletionContentPartUnionParam
		var text string
		switch content := m.Content.(type) {
		case string:
			text = content
			parts = append(parts, openai.TextContentPart(content))
		case []any:
			for _, item := range content {
				part := item.(map[string]any)
				if part["type"] == "image" {
					url := dataURL(tb, filepath.Join(golden, g.Images[next]))
					next++
					parts = append(parts, openai.ImageContentPart(openai.ChatCompletionContentPartImageImageURLParam{URL: url}))
					continue
				}
				text = part["text"].(string)
				parts = append(parts, openai.TextContentPart(text))
			}
		}
		switch m.Role {
		case "user":
			p.Messages = append(p.Messages, openai.UserMessage(parts))
		case "system":
			p.Messages = append(p.Messages, openai.SystemMessage(text))
		case "assistant":
			p.Messages = append(p.Messages, openai.AssistantMessage(text))
		default:
			tb.Fatalf("role %q in a golden case", m.Role)
		}
	}
	return p
}

// post sends a raw JSON body and returns status and body.
func (c *cluster) post(tb testing.TB, path, body string) (int, string) {
	tb.Helper()
	resp, err := http.Post(c.url+path, "application/json", strings.NewReader(body))
	if err != nil {
		tb.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		tb.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

// streamed is what a streaming request returned.
type streamed struct {
	text     string // of all choices, one behind the other
	finish   string
	usage    openai.CompletionUsage
	first    time.Duration // to the first content
	total    time.Duration
	longest  time.Duration // between two pieces of content
	contents int
}

// stream sends p as a streaming request. onPiece, if any, is called for each piece of content.
func (c *cluster) stream(ctx context.Context, p openai.ChatCompletionNewParams, onPiece func(int)) (streamed, error) {
	p.StreamOptions.IncludeUsage = openai.Bool(true)
	begin := time.Now()
	last := begin
	client := c.client()
	s := client.Chat.Completions.NewStreaming(ctx, p)
	defer s.Close()
	var r streamed
	var texts []string // by choice
	for s.Next() {
		chunk := s.Current()
		if chunk.Usage.TotalTokens > 0 {
			r.usage = chunk.Usage
		}
		for _, ch := range chunk.Choices {
			if ch.FinishReason != "" {
				r.finish = ch.FinishReason
			}
			if ch.Delta.Content == "" {
				continue
			}
			now := time.Now()
			if r.contents == 0 {
				r.first = now.Sub(begin)
			} else {
				r.longest = max(r.longest, now.Sub(last))
			}
			last = now
			r.contents++
			for len(texts) <= int(ch.Index) {
				texts = append(texts, "")
			}
			texts[ch.Index] += ch.Delta.Content
			if onPiece != nil {
				onPiece(r.contents)
			}
		}
	}
	r.text = strings.Join(texts, "")
	r.total = time.Since(begin)
	return r, s.Err()
}
