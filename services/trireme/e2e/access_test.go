package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
)

// The official client and the program's own are let in with a key and not without; nothing that others of the machine can see, and nothing
// that is written, has a key in it.
func TestKeysOfUp(t *testing.T) {
	t.Parallel()
	keys := []string{"TRIREME_API_KEY=sk-first-of-two,sk-second-of-two"}
	c := startWith(t, keys, "--log-level", "debug", "--allowed-origin", "https://app.example.com")
	for key, status := range map[string]int{"sk-first-of-two": 0, "sk-second-of-two": 0, "sk-of-nobody": 401} {
		client := openai.NewClient(option.WithBaseURL(c.url+"/v1"), option.WithAPIKey(key), option.WithMaxRetries(0), option.WithHTTPClient(http.DefaultClient))
		answer, err := client.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{
			Model: "shapes-vl-moe", Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage("Hello!")},
		})
		var refused *openai.Error
		switch {
		case status == 0 && (err != nil || !strings.HasPrefix(answer.Choices[0].Message.Content, "Hello!")):
			t.Errorf("%s: %v, %v", key, answer, err)
		case status != 0 && (!errors.As(err, &refused) || refused.StatusCode != status || refused.Code != "invalid_api_key"):
			t.Errorf("%s: %v", key, err)
		}
	}
	if status, said := c.post(t, "/v1/chat/completions", `{"messages":[{"role":"user","content":"Hello!"}]}`); status != 401 || !strings.Contains(said, "OPENAI_API_KEY") {
		t.Errorf("without a key: %d %s", status, said)
	}
	preflight, err := http.NewRequest("OPTIONS", c.url+"/v1/chat/completions", nil)
	if err != nil {
		t.Fatal(err)
	}
	preflight.Header = http.Header{"Origin": {"https://app.example.com"}, "Access-Control-Request-Method": {"POST"}, "Access-Control-Request-Headers": {"authorization"}}
	resp, err := http.DefaultClient.Do(preflight)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 204 || resp.Header.Get("Access-Control-Allow-Origin") != "https://app.example.com" || resp.Header.Get("Access-Control-Allow-Headers") != "authorization" {
		t.Errorf("preflight: %d %v", resp.StatusCode, resp.Header)
	}
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	chat := exec.Command(path, "chat", "--url", c.url, "Hello!")
	chat.Env = append(os.Environ(), keys...)
	if out, err := chat.Output(); err != nil || !strings.HasPrefix(string(out), "Hello!") {
		t.Errorf("chat with the key of the environment: %q, %v", out, err)
	}
	looked := 0
	for _, p := range c.children() {
		args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.pid))
		if err != nil {
			t.Fatal(err)
		}
		environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.pid))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(args), "-of-two") {
			t.Errorf("the arguments of %s have a key", p.role)
		}
		if has := strings.Contains(string(environ), "TRIREME_API_KEY=sk-first-of-two,sk-second-of-two\x00"); has != (p.role == "gateway") {
			t.Errorf("the environment of %s has keys: %v", p.role, has)
		}
		looked++
	}
	if looked != 5 {
		t.Errorf("up has %d children", looked)
	}
	if log := c.log.String(); strings.Contains(log, "-of-two") || strings.Contains(log, "sk-of-nobody") || !strings.Contains(log, "api_keys=2") {
		t.Errorf("the log has a key, or does not say how many there are:\n%s", log)
	}
}

// Two encoders serve metrics at free ports, and status says at which.
func TestMetricsOfSeveralInstances(t *testing.T) {
	t.Parallel()
	settings := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(settings, []byte("encoder: {metrics: 127.0.0.1:0}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := start(t, "--config", settings, "--topology", "2E1P1D")
	var addresses []string
	for deadline := time.Now().Add(time.Minute); len(addresses) < 2; time.Sleep(20 * time.Millisecond) { // up is ready when one of them is
		if time.Now().After(deadline) {
			t.Fatalf("after a minute there are encoders with metrics at %q", addresses)
		}
		addresses = nil
		for _, i := range c.status(t)["instances"].([]any) {
			if i := i.(map[string]any); i["role"] == "encode" && i["ready"] == true {
				addresses = append(addresses, fmt.Sprint(i["metrics"]))
			}
		}
	}
	if addresses[0] == addresses[1] {
		t.Errorf("both are at %s", addresses[0])
	}
	for _, address := range addresses {
		resp, err := http.Get("http://" + address + "/health")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != 200 {
			t.Errorf("%s: %d", address, resp.StatusCode)
		}
	}
}
