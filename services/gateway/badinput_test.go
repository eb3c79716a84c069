package gateway_test

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"image/color"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/packages/param"

	"trireme.dev/services/gateway"
)

// hugePNG is a PNG header of w x h pixels and nothing behind it.
func hugePNG(w, h uint32) []byte {
	b := []byte("\x89PNG\r\n\x1a\n")
	ihdr := append([]byte("IHDR"), make([]byte, 13)...)
	binary.BigEndian.PutUint32(ihdr[4:], w)
	binary.BigEndian.PutUint32(ihdr[8:], h)
	copy(ihdr[12:], []byte{8, 2, 0, 0, 0})
	b = binary.BigEndian.AppendUint32(b, 13)
	b = append(b, ihdr...)
	return binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(ihdr))
}

// TestBadInput sends every kind of bad request and then a good one: a clear error, nothing lost, the service up.
func TestBadInput(t *testing.T) {
	f := start(t, nil)
	const hello = `"messages":[{"role":"user","content":"hi"}]`
	picture := func(url string) string {
		return `{"model":"shapes","messages":[{"role":"user","content":[{"type":"text","text":"what?"},{"type":"image_url","image_url":{"url":"` + url + `"}}]}]}`
	}
	const pictureParam = "messages[0].content[1].image_url.url"
	whole := pngOf(t, 64, 64, color.White)
	long := strings.Repeat("word ", 9000)
	const chat, text = "/v1/chat/completions", "/v1/completions"
	for _, test := range []struct {
		name, path, body string
		status           int
		param            string
	}{
		{"malformed", chat, `{"model":"shapes",`, 400, ""},
		{"not UTF-8", chat, `{"model":"shapes","messages":[{"role":"user","content":"` + "\xff\xfe" + `"}]}`, 400, ""},
		{"not an object", chat, `"hi"`, 400, ""},
		{"unknown model", chat, `{"model":"gpt-7",` + hello + `}`, 404, "model"},
		{"unknown model of completions", text, `{"model":"gpt-7","prompt":"x"}`, 404, "model"},
		{"zero messages", chat, `{"model":"shapes","messages":[]}`, 400, "messages"},
		{"no messages", chat, `{"model":"shapes"}`, 400, "messages"},
		{"unknown role", chat, `{"model":"shapes","messages":[{"role":"robot","content":"hi"}]}`, 400, "messages[0].role"},
		{"unknown part", chat, `{"model":"shapes","messages":[{"role":"user","content":[{"type":"smell"}]}]}`, 400, "messages[0].content[0].type"},
		{"negative max_tokens", chat, `{"model":"shapes",` + hello + `,"max_tokens":-5}`, 400, "max_tokens"},
		{"n zero", chat, `{"model":"shapes",` + hello + `,"n":0}`, 400, "n"},
		{"temperature", chat, `{"model":"shapes",` + hello + `,"temperature":2.5}`, 400, "temperature"},
		{"temperature below", chat, `{"model":"shapes",` + hello + `,"temperature":-1}`, 400, "temperature"},
		{"stop of the wrong type", chat, `{"model":"shapes",` + hello + `,"stop":{"a":1}}`, 400, "stop"},
		{"prompt over the context", chat, `{"model":"shapes","messages":[{"role":"user","content":"` + long + `"}]}`, 400, "messages"},
		{"prompt far over the context", chat, `{"model":"shapes","messages":[{"role":"user","content":"` + strings.Repeat(long, 100) + `"}]}`, 400, "messages"},
		{"max_tokens over the context", chat, `{"model":"shapes",` + hello + `,"max_tokens":8192}`, 400, "max_tokens"},
		{"prompt over the context of completions", text, `{"model":"shapes","prompt":"` + long + `"}`, 400, "prompt"},
		{"empty prompt", text, `{"model":"shapes","prompt":""}`, 400, "prompt"},
		{"id beyond the vocabulary", text, `{"model":"shapes","prompt":[5,1024]}`, 400, "prompt"},
		{"stop id beyond the vocabulary", text, `{"model":"shapes","prompt":"x","stop_token_ids":[2000]}`, 400, "stop_token_ids"},
		{"min_tokens over the rest", text, `{"model":"shapes","prompt":"x","min_tokens":9000}`, 400, "min_tokens"},
		{"picture token in text", chat, `{"model":"shapes","messages":[{"role":"user","content":"<|image_pad|>"}]}`, 400, "messages"},
		{"picture token in a prompt", text, `{"model":"shapes","prompt":"<|image_pad|>"}`, 400, "prompt"},
		{"no picture", chat, picture("data:image/png;base64," + base64.StdEncoding.EncodeToString([]byte("hello, I am text"))), 400, pictureParam},
		{"empty picture", chat, picture("data:image/png;base64,"), 400, pictureParam},
		{"truncated header", chat, picture(dataURL(whole[:20])), 400, pictureParam},
		{"truncated", chat, picture(dataURL(whole[:len(whole)-20])), 400, pictureParam},
		{"huge header", chat, picture(dataURL(hugePNG(50_000, 50_000))), 400, pictureParam},
		{"header beyond all bounds", chat, picture(dataURL(hugePNG(1<<31-1, 1<<31-1))), 400, pictureParam},
		{"sides too different", chat, picture(dataURL(pngOf(t, 500, 1, color.White))), 400, pictureParam},
		{"not base64", chat, picture("data:image/png;base64,$$$$"), 400, pictureParam},
		{"data URL of text", chat, picture("data:text/plain,hello"), 400, pictureParam},
		{"file", chat, picture("file:///etc/passwd"), 400, pictureParam},
		{"loopback", chat, picture("http://127.0.0.1/x.png"), 400, pictureParam},
		{"own port", chat, picture(f.url + "/v1/models"), 400, pictureParam},
		{"localhost", chat, picture("http://localhost:8080/x.png"), 400, pictureParam},
		{"private", chat, picture("http://192.168.0.1/x.png"), 400, pictureParam},
		{"link-local", chat, picture("http://169.254.1.1/x.png"), 400, pictureParam},
		{"metadata", chat, picture("http://169.254.169.254/latest/meta-data/"), 400, pictureParam},
		{"IPv6 loopback", chat, picture("http://[::1]/x.png"), 400, pictureParam},
		{"no such path", "/v1/embeddings", `{}`, 404, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			status, header, body := f.post(test.path, test.body)
			e := parseError(t, body)
			got := ""
			if e.Error.Param != nil {
				got = *e.Error.Param
			}
			if status != test.status || got != test.param || !strings.HasPrefix(header.Get("Content-Type"), "application/json") {
				t.Errorf("%d %q: %s", status, got, body)
			}
			if len(body) > 1000 {
				t.Errorf("an error of %d bytes", len(body))
			}
		})
	}
	t.Run("official client", func(t *testing.T) {
		_, err := f.client.Chat.Completions.New(t.Context(), openai.ChatCompletionNewParams{
			Model: "shapes", Messages: user("Hi."), Temperature: param.NewOpt(3.0)})
		var e *openai.Error
		if !errors.As(err, &e) || e.StatusCode != 400 || e.Param != "temperature" || e.Type != "invalid_request_error" {
			t.Errorf("%v", err)
		}
	})
	t.Run("errors that tell the remedy", func(t *testing.T) {
		for _, x := range []struct{ method, path, encoding, body, want string }{
			{"POST", "/chat/completions", "", "{}", "There is nothing at POST /chat/completions; paths of the API begin with /v1, as /v1/chat/completions."},
			{"POST", "/v1/v1/chat/completions", "", "{}", "There is nothing at POST /v1/v1/chat/completions; there are /v1/chat/completions, /v1/completions and /v1/models."},
			{"GET", chat, "", "", "GET is not taken at /v1/chat/completions; POST is."},
			{"POST", "/v1/models", "", "{}", "POST is not taken at /v1/models; GET is."},
			{"POST", chat, "gzip", "{}", "A body with Content-Encoding gzip is not taken; send it as it is."},
			{"POST", chat, "", picture("http://127.0.0.1/x.png"), "Picture URL leads to an address that is not allowed: loopback, private and metadata addresses are not, " +
				"unless the server was started with --allow-media-host."},
			{"POST", chat, "", picture("gopher://x/y"), "Unusable picture URL: "},
			{"POST", chat, "", `{"modalities":["audio"],` + hello + `}`, "This server answers with text only."},
		} {
			req, err := http.NewRequestWithContext(t.Context(), x.method, f.url+x.path, strings.NewReader(x.body))
			if err != nil {
				t.Fatal(err)
			}
			if x.encoding != "" {
				req.Header.Set("Content-Encoding", x.encoding)
			}
			resp, err := f.http.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || resp.StatusCode < 400 || !strings.HasPrefix(parseError(t, string(body)).Error.Message, x.want) {
				t.Errorf("%s %s: %s, %s; want %q", x.method, x.path, resp.Status, body, x.want)
			}
		}
	})
	t.Run("methods", func(t *testing.T) {
		resp, err := f.http.Get(f.url + chat)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if body, _ := io.ReadAll(resp.Body); resp.StatusCode != 405 || parseError(t, string(body)).Error.Type != "invalid_request_error" {
			t.Errorf("%d %s", resp.StatusCode, body)
		}
	})
	if got, err := f.chat(openai.ChatCompletionNewParams{}); err != nil || got != "Hello, world!" {
		t.Errorf("after all that: %q %v", got, err)
	}
	f.settled()
}

func TestBodyOverTheLimit(t *testing.T) {
	f := start(t, func(cfg *gateway.Config, _ *stages) { cfg.MaxBody = 1 << 20 })
	body := append([]byte(`{"model":"shapes","messages":[{"role":"user","content":"`), bytes.Repeat([]byte("x"), 1<<20)...)
	for name, reader := range map[string]io.Reader{
		"with a length": bytes.NewReader(body),
		"in chunks":     io.MultiReader(bytes.NewReader(body)), // no type that net/http knows the length of
	} {
		resp, err := f.http.Post(f.url+"/v1/chat/completions", "application/json", reader)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		answer, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if e := parseError(t, string(answer)); resp.StatusCode != http.StatusRequestEntityTooLarge || *e.Error.Code != "request_too_large" {
			t.Errorf("%s: %d %s", name, resp.StatusCode, answer)
		}
	}
	if got, err := f.chat(openai.ChatCompletionNewParams{}); err != nil || got != "Hello, world!" {
		t.Errorf("after that: %q %v", got, err)
	}
}

// TestBodyLimitDefault is 64 MiB: a body below it is read, one above it is not.
func TestBodyLimitDefault(t *testing.T) {
	f := start(t, nil)
	for size, want := range map[int]int{60 << 20: 400, 64<<20 + 1: 413} {
		status, _, body := f.post("/v1/chat/completions", `{"x":"`+strings.Repeat("y", size)+`","messages":[]}`)
		if status != want {
			t.Errorf("%d bytes: %d %.200s", size, status, body)
		}
	}
}

// postWhole sends all of a request before it reads the answer, as most clients do. Go's own reads earlier.
func postWhole(t *testing.T, f *fixture, path, header, body string) (status int, answer string) {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(f.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n%s", path, header, len(body), body); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return resp.StatusCode, string(data)
}

// Who sends a long body where nobody wants it, as a picture without the /v1, reads what is wrong, and meets no broken connection.
func TestLongBodyNobodyWants(t *testing.T) {
	f := start(t, nil)
	long := `{"messages":[{"role":"user","content":"` + strings.Repeat("long ", 4<<20) + `"}]}`
	for _, x := range []struct {
		path, header string
		status       int
	}{
		{"/chat/completions", "", 404}, {"/v1/models", "", 405}, {"/health", "", 405}, {"/v1/chat/completions", "Content-Encoding: gzip\r\n", 415},
	} {
		if status, answer := postWhole(t, f, x.path, x.header, long); status != x.status || parseError(t, answer).Error.Message == "" {
			t.Errorf("%s: %d %s", x.path, status, answer)
		}
	}
}
