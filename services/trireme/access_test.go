package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"trireme.dev/services/trireme/supervise"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

// commandLine is what the parser makes of a command line.
func commandLine(t *testing.T, args ...string) *cli {
	t.Helper()
	var c cli
	if _, err := newParser(&c, args, new(bytes.Buffer), new(bytes.Buffer), func(int) {}).Parse(shielded(args)); err != nil {
		t.Fatalf("%q: %v", args, err)
	}
	return &c
}

// Keys come from flags, or else the environment, or else a file.
func TestKeysOfTheGateway(t *testing.T) {
	file := filepath.Join(t.TempDir(), "settings.yaml")
	if err := os.WriteFile(file, []byte("up: {api-key: [file-1, file-2], allowed-origin: [\"https://a.com\", \"https://b.com\"]}\ngateway: {api-key: file-3}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		variable, args, up, gateway string
	}{
		{args: "--api-key a --api-key b", up: "a b", gateway: "a b"},
		{variable: "c,d", up: "c d", gateway: "c d"},
		{variable: "c,d", args: "--api-key a", up: "a", gateway: "a"},
		{args: "--config " + file, up: "file-1 file-2", gateway: "file-3"},
		{variable: "c", args: "--config " + file, up: "c", gateway: "c"},
	} {
		if os.Unsetenv(keysVariable); x.variable != "" {
			t.Setenv(keysVariable, x.variable)
		}
		up := commandLine(t, append([]string{"up"}, strings.Fields(x.args)...)...).Up
		gateway := commandLine(t, append([]string{"gateway"}, strings.Fields(x.args)...)...).Gateway
		if got := strings.Join(up.keys(), " "); got != x.up {
			t.Errorf("%s, %s: up has the keys %s", x.variable, x.args, got)
		}
		if got := strings.Join(gateway.keys(), " "); got != x.gateway {
			t.Errorf("%s, %s: the gateway has the keys %s", x.variable, x.args, got)
		}
	}
	if up := commandLine(t, "up", "--config", file).Up; !slices.Equal(up.AllowedOrigin, []string{"https://a.com", "https://b.com"}) {
		t.Errorf("origins %q", up.AllowedOrigin)
	}
}

// A key that was meant to be one and is none lets nobody in: nothing is started.
func TestKeysThatAreNone(t *testing.T) {
	for variable, args := range map[string]string{"": "", "SECRET,": "", "SECRET WORDS": "", "fine": "--api-key=", "fine too": "--api-key=SECRET,,"} {
		for _, command := range []string{"up --data " + t.TempDir(), "gateway --nats-url nats://127.0.0.1:1"} {
			t.Setenv(keysVariable, variable)
			text, status := said(strings.Fields(command + " " + args)...)
			if status != exitUsage || !strings.Contains(text, "API key number") || strings.Contains(text, "SECRET") {
				t.Errorf("%s=%q trireme %s %s: status %d, %s", keysVariable, variable, command, args, status, text)
			}
		}
	}
	os.Unsetenv(keysVariable)
	if text, status := said("up", "--data", t.TempDir(), "--allowed-origin", "https://a.com/"); status != exitUsage || !strings.Contains(text, "which is https://a.com") {
		t.Errorf("an origin with a path: status %d, %s", status, text)
	}
}

// Keys are no argument of a child, which everybody on the machine can read, and only the gateway has them.
func TestChildrenGetKeysByTheEnvironment(t *testing.T) {
	t.Setenv(keysVariable, "sk-of-up")
	c := &upCmd{
		Topology: "1EPD", HostMemory: 1 << 30, scalerFlags: scalerFlags{Scaler: "auto"},
		accessFlags: accessFlags{APIKey: []string{"sk-1", "sk-2,sk-3"}, AllowedOrigin: []string{"https://a.com", "*"}},
	}
	p, err := c.plan()
	if err != nil {
		t.Fatal(err)
	}
	keys := func(child supervise.Child) (found []string) {
		for _, v := range child.Env {
			if rest, ok := strings.CutPrefix(v, keysVariable+"="); ok {
				found = append(found, rest)
			}
		}
		return found
	}
	made := c.children(&env{}, p, "trireme")
	for _, child := range []supervise.Child{made.gateway, made.hmm, *made.scaler, made.stage(p.topology.Groups[0], "name")} {
		var want []string
		if child.Name == "gateway" {
			want = []string{"sk-1,sk-2,sk-3"}
		}
		if got := keys(child); !slices.Equal(got, want) || strings.Contains(strings.Join(child.Args, " "), "sk-") {
			t.Errorf("%s has the keys %q, and the arguments %q", child.Name, got, child.Args)
		}
	}
	if args := strings.Join(made.gateway.Args, " "); !strings.Contains(args, "--allowed-origin https://a.com --allowed-origin *") {
		t.Errorf("origins are not handed to the gateway: %s", args)
	}
	t.Setenv(keysVariable, strings.Join(keys(made.gateway), " "))
	if got := commandLine(t, "gateway").Gateway.keys(); !slices.Equal(got, []string{"sk-1", "sk-2", "sk-3"}) {
		t.Errorf("the gateway reads %q", got)
	}
	c.APIKey = nil
	if got := keys(c.children(&env{}, p, "trireme").gateway); got != nil {
		t.Errorf("without keys the gateway has %q", got)
	}
}

// Commands that talk to a gateway send the key that they are given, by a flag or in the environment, of several the first, and say how to give
// another one where it is not taken.
func TestCommandsSendTheKey(t *testing.T) {
	var sent []string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sent = append(sent, r.Header.Get("Authorization"))
		w.Header().Set("Content-Type", "application/json")
		if r.Header.Get("Authorization") != "Bearer sk-right" {
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprint(w, `{"error":{"message":"no","type":"invalid_request_error","param":null,"code":"invalid_api_key"}}`)
			return
		}
		if r.URL.Path == "/v1/models" {
			fmt.Fprint(w, `{"object":"list","data":[{"id":"echo","object":"model"}]}`)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		text, _ := json.Marshal("let in")
		fmt.Fprintf(w, `data: {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":%s},"finish_reason":"stop"}]}`+"\n\ndata: [DONE]\n\n", text)
	}))
	defer s.Close()
	nats := bustest.Run(t).URL()
	b, err := bus.Connect(t.Context(), nats, "test", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	letter := &wire.DeadLetter{ID: bus.NewDeadID(time.Now()), Time: time.Now(), Path: "/v1/chat/completions"}
	if err := b.Bury(t.Context(), letter, []byte(`{"messages":[]}`), nil); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		trireme, openai, flag, sent string
	}{
		{flag: "sk-right", sent: "Bearer sk-right"},
		{flag: "sk-right", trireme: "sk-wrong", openai: "sk-wrong", sent: "Bearer sk-right"},
		{trireme: "sk-right", openai: "sk-wrong", sent: "Bearer sk-right"},
		{trireme: "sk-right,sk-other", sent: "Bearer sk-right"},
		{openai: "sk-right", sent: "Bearer sk-right"},
		{openai: "sk-wrong", sent: "Bearer sk-wrong"},
		{sent: ""},
	} {
		for name, v := range map[string]string{keysVariable: x.trireme, "OPENAI_API_KEY": x.openai} {
			if os.Unsetenv(name); v != "" {
				t.Setenv(name, v)
			}
		}
		for _, command := range []string{"chat --url " + s.URL + " hi", "bench serve --requests 1 --warmup 0 --concurrency 1 --url " + s.URL,
			"dead replay " + letter.ID + " --nats-url " + nats + " --url " + s.URL} {
			args := strings.Fields(command)
			if x.flag != "" {
				args = append(args, "--api-key", x.flag)
			}
			sent = nil
			text, status := said(args...)
			if right := x.sent == "Bearer sk-right"; len(sent) == 0 || slices.ContainsFunc(sent, func(v string) bool { return v != x.sent }) || (status == 0) != right {
				t.Errorf("%+v: %s: sent %q, status %d, %s", x, command, sent, status, text)
			} else if !right && !strings.Contains(text, "401") {
				t.Errorf("%+v: %s: status %d, %s", x, command, status, text)
			}
		}
		if x.sent == "" {
			if text, _ := said("chat", "--url", s.URL, "hi"); !strings.Contains(text, "--api-key, TRIREME_API_KEY or OPENAI_API_KEY (401)") {
				t.Errorf("no remedy: %s", text)
			}
		}
	}
}
