package gateway_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"image"
	"image/color"
	"image/png"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"go.uber.org/goleak"

	"trireme.dev/services/gateway"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/leaktest"
)

func TestMain(m *testing.M) {
	// nats-server's file store has a goroutine that outlives its shutdown by a moment.
	leaktest.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/nats-io/nats-server/v2/server.(*fileStore).flushLoop"),
		goleak.IgnoreTopFunction("github.com/nats-io/nats.go/jetstream.(*jetStream).resetPendingAcksOnReconnect")) // see shared/bus
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

const modelDir = "../../models/shapes-vl-moe"

// theModel is the bundled model, read once.
var theModel = sync.OnceValues(func() (*gateway.Model, error) { return gateway.LoadModel(modelDir, 100_000_000) })

// fixture is a gateway with its NATS server, memory and stages.
type fixture struct {
	*stages
	nats   *bustest.Server
	url    string // of the API
	http   *http.Client
	client openai.Client
	stop   func()
}

// start starts a gateway. change may change its configuration and the stages before it serves.
func start(t *testing.T, change func(cfg *gateway.Config, s *stages)) *fixture {
	t.Helper()
	model, err := theModel()
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{nats: bustest.Run(t)}
	m := newMemory()
	f.stages = startStages(t, f.nats.URL(), m, model)
	cfg := gateway.Config{ModelName: "shapes", Instance: "gateway-test", ResendWait: 5 * time.Millisecond, ConfirmWait: 100 * time.Millisecond}
	if change != nil {
		change(&cfg, f.stages)
	}
	b, err := bus.Connect(t.Context(), f.nats.URL(), "gateway", quiet())
	if err != nil {
		t.Fatal(err)
	}
	g, err := gateway.New(t.Context(), cfg, gateway.Parts{Bus: b, Dial: m.dial, Model: model, Log: quiet()})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.url = "http://" + l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- g.Serve(ctx, l) }()
	f.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		b.Close()
	})
	transport := &http.Transport{}
	f.http = &http.Client{Transport: transport}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		f.stop()
	})
	f.client = openai.NewClient(option.WithBaseURL(f.url+"/v1"), option.WithAPIKey("none"), option.WithHTTPClient(f.http),
		option.WithMaxRetries(0))
	return f
}

// post sends a body and returns status, headers and answer.
func (f *fixture) post(path, body string) (int, http.Header, string) {
	f.t.Helper()
	resp, err := f.http.Post(f.url+path, "application/json", strings.NewReader(body))
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, string(data)
}

// events are the data of a stream's events.
func events(body string) []string {
	var out []string
	for e := range strings.SplitSeq(strings.TrimSuffix(body, "\n\n"), "\n\n") {
		out = append(out, e)
	}
	return out
}

// apiError is an error object.
type apiError struct {
	Error struct {
		Message, Type string
		Param, Code   *string
	}
}

func parseError(t *testing.T, body string) apiError {
	t.Helper()
	var e apiError
	if err := json.Unmarshal([]byte(body), &e); err != nil || e.Error.Message == "" || e.Error.Type == "" {
		t.Fatalf("no error object: %q", body)
	}
	return e
}

func user(text string) []openai.ChatCompletionMessageParamUnion {
	return []openai.ChatCompletionMessageParamUnion{openai.UserMessage(text)}
}

// pngOf draws a picture of one colour.
func pngOf(t *testing.T, w, h int, c color.Color) []byte {
	t.Helper()
	img := image.NewPaletted(image.Rect(0, 0, w, h), color.Palette{c})
	var b bytes.Buffer
	if err := png.Encode(&b, img); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func dataURL(b []byte) string { return "data:image/png;base64," + base64.StdEncoding.EncodeToString(b) }

// settled waits until the gateway has told the end of every request it began, and its credits are back.
func (f *fixture) settled() {
	f.t.Helper()
	f.await("every request told as done, and its memory ended", func() bool {
		for _, q := range f.asked {
			if !f.done[part{q.ID, -1}] {
				return false
			}
		}
		f.memory.mu.Lock()
		defer f.memory.mu.Unlock()
		return len(f.memory.objects) == 0
	})
	f.await("credits returned", func() bool { return f.metric("trireme_num_requests_running") == "0" })
}

// metric is the value of a metric without labels but the model's, "" when it is not there.
func (f *fixture) metric(name string) string { return f.series(name, `model_name="shapes"`) }

// series is the value of a metric with labels, in the order of their names; "" when it is not there.
func (f *fixture) series(name, labels string) string {
	resp, err := f.http.Get(f.url + "/metrics")
	if err != nil {
		f.t.Error(err)
		return ""
	}
	defer resp.Body.Close()
	data, _ := io.ReadAll(resp.Body)
	for line := range strings.SplitSeq(string(data), "\n") {
		if rest, ok := strings.CutPrefix(line, name+"{"+labels+"} "); ok {
			return rest
		}
	}
	return ""
}
