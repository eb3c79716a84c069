package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// echoServer streams the text of the last message of each chat back.
func echoServer(t *testing.T) string {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/models" {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprint(w, `{"object":"list","data":[{"id":"echo","object":"model"}]}`)
			return
		}
		var asked struct {
			Messages []struct {
				Content []struct{ Text string }
			}
		}
		if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
			t.Error(err)
		}
		parts := asked.Messages[len(asked.Messages)-1].Content
		text, _ := json.Marshal(parts[len(parts)-1].Text)
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(w, `data: {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":%s},"finish_reason":"stop"}]}`+"\n\ndata: [DONE]\n\n", text)
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// What is at --url and is no gateway, or ends in the middle, is said in words of somebody who asks.
func TestChatElsewhere(t *testing.T) {
	other := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(other.Close)
	dies := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	t.Cleanup(dies.Close)
	breaks := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, `data: {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"1 2"}}]}`+"\n\n")
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}))
	t.Cleanup(breaks.Close)
	var out, said bytes.Buffer
	if run([]string{"chat", "--url", breaks.URL, "--model", "m", "hi"}, nil, &out, &said) != exitFailed || out.String() != "1 2\n" || !strings.Contains(said.String(), "closed the connection") {
		t.Errorf("an answer that ends in the middle: %q, %q", out.String(), said.String())
	}
	nats, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nats.Close() })
	go func() {
		for {
			c, err := nats.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, "INFO {\"server_id\":\"N\"}\r\n")
			go io.Copy(io.Discard, c)
		}
	}()
	for url, want := range map[string]string{
		other.URL: "not one with OpenAI's API", dies.URL: "closed the connection", "http://" + nats.Addr().String(): "does not speak HTTP",
	} {
		var out, said bytes.Buffer
		if status := run([]string{"chat", "--url", url, "hi"}, nil, &out, &said); status != exitFailed || !strings.Contains(said.String(), want) {
			t.Errorf("%s: status %d, %q; want %q", url, status, said.String(), want)
		}
	}
}

// All of stdin is the question, and not its first line.
func TestChatQuestion(t *testing.T) {
	url := echoServer(t)
	for _, x := range []struct {
		args      []string
		stdin     string
		want      string
		wantError string
	}{
		{args: []string{"argument"}, stdin: "stdin\n", want: "argument\n"},
		{args: []string{"--url", url + "/v1/", "as of OpenAI's clients"}, want: "as of OpenAI's clients\n"},
		{stdin: "one line", want: "one line\n"},
		{stdin: "first\n\n  second\nthird\n", want: "first\n\n  second\nthird\n"},
		{stdin: " \n\n", wantError: "no question"},
		{stdin: strings.Repeat("x", mostQuestion+1), wantError: "more than 1048576 bytes"},
		{args: []string{"--max-tokens=-1", "x"}, wantError: "--max-tokens -1 cannot be negative"},
	} {
		var out, said bytes.Buffer
		status := run(append([]string{"chat", "--url", url}, x.args...), strings.NewReader(x.stdin), &out, &said)
		switch {
		case x.wantError == "" && (status != 0 || out.String() != x.want):
			t.Errorf("%q, stdin %.20q: status %d, %q, %s", x.args, x.stdin, status, out.String(), said.String())
		case x.wantError != "" && (status != exitUsage || !strings.Contains(said.String(), x.wantError)):
			t.Errorf("%q, stdin %.20q: status %d, %s; want %q", x.args, x.stdin, status, said.String(), x.wantError)
		}
	}
}
