package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"

	"trireme.dev/shared/bus/bustest"
)

// up runs `trireme up` with what cannot work and returns its exit status and what it said.
func up(t *testing.T, args ...string) (int, string) {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, append([]string{"up", "--data", t.TempDir()}, args...)...).CombinedOutput()
	if ee := (*exec.ExitError)(nil); errors.As(err, &ee) {
		return ee.ExitCode(), string(out)
	}
	if err != nil {
		t.Fatal(err)
	}
	return 0, string(out)
}

// copyModel copies the bundled model so that a test can spoil it.
func copyModel(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "model")
	if err := os.CopyFS(dir, os.DirFS(root+"/models/shapes-vl-moe")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// with returns args and more in a slice of its own.
func with(args []string, more ...string) []string { return slices.Concat(args, more) }

// What cannot work is one sentence that names the port or file, and a status that is not 0.
func TestUpRefuses(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := taken.Addr().String()
	freePorts := []string{"--http", "127.0.0.1:0", "--nats", "127.0.0.1:0", "--monitor", "127.0.0.1:0"}

	missing := copyModel(t)
	if err := os.Remove(filepath.Join(missing, "model-00002-of-00003.safetensors")); err != nil {
		t.Fatal(err)
	}
	cut := copyModel(t)
	if err := os.Truncate(filepath.Join(cut, "model-00003-of-00003.safetensors"), 5_000_000); err != nil {
		t.Fatal(err)
	}
	config, err := os.ReadFile(filepath.Join(cut, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	spoilt := strings.Replace(string(config), "Qwen3VLMoeForConditionalGeneration", "LlamaForCausalLM", 1)
	write := func(file, content string) string {
		dir := copyModel(t)
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	without := func(file string) string {
		dir := copyModel(t)
		if err := os.Remove(filepath.Join(dir, file)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	settings := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(settings, []byte("up:\n  htttp: 127.0.0.1:1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, x := range map[string]struct {
		args []string
		say  string
	}{
		"HTTP port in use":     {with(freePorts[2:], "--http", port), port},
		"NATS port in use":     {with(freePorts[:2], "--monitor", "127.0.0.1:0", "--nats", port), port},
		"monitor port in use":  {with(freePorts[:4], "--monitor", port), port},
		"missing shard":        {with(freePorts, "--model", missing), "model-00002-of-00003.safetensors"},
		"cut file":             {with(freePorts, "--model", cut), "model-00003-of-00003.safetensors"},
		"unknown architecture": {with(freePorts, "--model", write("config.json", spoilt)), "LlamaForCausalLM"},
		"broken template":      {with(freePorts, "--model", write("chat_template.jinja", "{% for x in %}")), "chat_template.jinja"},
		"broken settings":      {with(freePorts, "--model", write("tokenizer_config.json", "{")), "tokenizer_config.json"},
		"no tokenizer":         {with(freePorts, "--model", without("tokenizer.json")), "tokenizer.json"},
		"no preprocessor":      {with(freePorts, "--model", without("preprocessor_config.json")), "preprocessor_config.json"},
		"no NATS there":        {with(freePorts[:2], "--nats-url", "nats://127.0.0.1:1"), "nats://127.0.0.1:1"},
		"no NATS URL":          {with(freePorts[:2], "--nats-url", "nats://[::1"), "nats://[::1"},
		"no encoder":           {with(freePorts, "--topology", "1P1D"), "role E"},
		"no room for weights":  {with(freePorts, "--weights-memory", "17MiB"), "--weights-memory"},
		"no folder":            {with(freePorts, "--model", "/does/not/exist"), "/does/not/exist"},
		"name of a model":      {with(freePorts, "--model", "Qwen/Qwen3-VL-30B-A3B-Instruct"), "not downloaded"},
		"a file":               {with(freePorts, "--model", filepath.Join(cut, "config.json")), "no such folder"},
		"too much memory":      {with(freePorts, "--npu-memory", "100TiB"), "100 TiB"},
		"name of the node":     {with(freePorts, "--node", "host.example"), `trireme up: --node "host.example": letters`},
		"weight of a tenant":   {with(freePorts, "--tenant-weight", "search=0"), "--tenant-weight search=0"},
		"topology":             {with(freePorts, "--topology", "1E1P"), "role D"},
		"topology notation":    {with(freePorts, "--topology", "many"), "many"},
		"order of roles":       {with(freePorts, "--topology", "1PE1D"), `"PE"`},
		"too many NPUs":        {with(freePorts, "--topology", "1EPDx65"), "64 NPUs"},
		"setting":              {with(freePorts, "--config", settings), "up.htttp"},
		"flag":                 {with(freePorts, "--htttp", "x"), "--htttp"},
	} {
		status, said := up(t, x.args...)
		if status != 2 || !strings.Contains(said, x.say) { // 2: trying again will not help
			t.Errorf("%s: status %d, said %q, want 2 and %q in it", name, status, said, x.say)
		}
		if n := strings.Count(strings.TrimSpace(said), "\n"); n > 0 {
			t.Errorf("%s: %d lines instead of one sentence:\n%s", name, n+1, said)
		}
	}
}

// Two ups cannot share a data folder.
func TestOneUpForEachDataFolder(t *testing.T) {
	t.Parallel()
	c := start(t)
	status, said := up(t, "--http", "127.0.0.1:0", "--nats", "127.0.0.1:0", "--monitor", "127.0.0.1:0", "--data", c.data)
	if status == 0 || !strings.Contains(said, c.data) {
		t.Errorf("a second up: status %d, %q", status, said)
	}
}

// An existing NATS server instead of the embedded one, and settings from a file, which the children read as well.
func TestUpOnExistingNATS(t *testing.T) {
	t.Parallel()
	server := bustest.Run(t)
	settings := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(settings, []byte(fmt.Sprintf("up:\n  nats-url: %s\n  topology: 1E1P1D\ngateway:\n  max-body: 1KiB\n", server.URL())), 0o600); err != nil {
		t.Fatal(err)
	}
	c := start(t, "--config", settings)
	client := c.client()
	resp, err := client.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{
		Model: "shapes-vl-moe", Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage("Hello!")},
	})
	if err != nil || !strings.HasPrefix(resp.Choices[0].Message.Content, "Hello!") {
		t.Errorf("%v, %v", resp, err)
	}
	_, err = client.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{
		Model: "shapes-vl-moe", Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage(strings.Repeat("Hello! ", 200))},
	})
	if api := (*openai.Error)(nil); !errors.As(err, &api) || api.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("a body over the file's limit: %v", err)
	}
}

// The chat and status commands, as a user runs them.
func TestChatAndStatus(t *testing.T) {
	t.Parallel()
	c := start(t)
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(path, "chat", "--url", c.url, "--image", root+"/docs/shapes.png", "Describe the image.").Output()
	if want := "A small purple circle in the top left, a large green star on the left and a small blue cross at the bottom.\n"; err != nil || string(out) != want {
		t.Errorf("chat: %q, %v", out, err)
	}
	chat := exec.Command(path, "chat", "--url", c.url, "--json", "Count from 3 to 9.")
	chat.Env = append(os.Environ(), "TRIREME_MODEL=/a/folder") // set for up; it is no model's name
	out, err = chat.Output()
	if err != nil || !strings.Contains(string(out), `"answer":"3 4 5 6 7 8 9`) || !strings.Contains(string(out), `"ttft_seconds"`) {
		t.Errorf("chat --json: %s, %v", out, err)
	}
	out, err = exec.Command(path, "chat", "--url", "http://127.0.0.1:1", "hi").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "trireme up") {
		t.Errorf("chat with nothing there: %s, %v", out, err)
	}
	var s map[string]any
	eventually(t, "status lists a node", func() bool { // it waits a second for an HMM, which may stand still for longer
		s = c.status(t)
		return len(s["nodes"].([]any)) > 0
	})
	if n := len(s["instances"].([]any)); n != 4 {
		t.Errorf("status lists %d instances, want 4", n)
	}
	if n := len(s["queues"].([]any)); n != 3 {
		t.Errorf("status lists %d queues, want 3", n)
	}
	if n := len(s["nodes"].([]any)); n != 1 {
		t.Errorf("status lists %d nodes, want 1", n)
	}
}

// Who ends up with timeout sends two signals, the second one to its process group: it stops in order all the same.
func TestTimeoutStopsInOrder(t *testing.T) {
	t.Parallel()
	c := start(t)
	_ = syscall.Kill(c.cmd.Process.Pid, syscall.SIGTERM)
	time.Sleep(20 * time.Millisecond) // two at once could be heard as one anyway
	_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGTERM)
	<-c.exited
	c.killed = true
	if code := c.cmd.ProcessState.ExitCode(); code != 0 || !strings.Contains(c.log.String(), "stopping  hmm") {
		t.Errorf("up ended with %v:\n%s", c.cmd.ProcessState, c.log)
	}
}

// A second Ctrl-C does not wait for open requests.
func TestSecondInterruptStopsAtOnce(t *testing.T) {
	t.Parallel()
	c := start(t, eachStep(t, 10)...)
	p := openai.ChatCompletionNewParams{
		Model: "shapes-vl-moe", Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage("Hello!")},
	}
	p.SetExtraFields(map[string]any{"ignore_eos": true}) // thousands of tokens: more than a minute
	client := c.client()
	stream := client.Chat.Completions.NewStreaming(t.Context(), p)
	defer stream.Close()
	if !stream.Next() {
		t.Fatal(stream.Err())
	}
	children := c.children()
	c.killed = true
	_ = c.cmd.Process.Signal(os.Interrupt)
	for !strings.Contains(c.log.String(), "stopping  gateway") && t.Context().Err() == nil {
		time.Sleep(time.Millisecond)
	}
	for gone := false; !gone; {
		_ = c.cmd.Process.Signal(os.Interrupt)
		select {
		case <-c.exited:
			gone = true
		case <-time.After(time.Millisecond):
		}
	}
	s := c.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if bySignal := s.Signaled() && s.Signal() == syscall.SIGINT; !bySignal && s.ExitStatus() != 128+int(syscall.SIGINT) { // started with SIGINT ignored
		t.Errorf("up ended with %v:\n%s", c.cmd.ProcessState, c.log)
	}
	for _, p := range children { // a dead one that nobody has waited for has an empty command line
		for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			if line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid)); len(line) == 0 {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("child %d (%s) outlived up", p.pid, p.role)
			}
		}
	}
}
