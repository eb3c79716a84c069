package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"syscall"

	"trireme.dev/services/trireme/load"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/wire"
)

type deadReplayCmd struct {
	ID   string `arg:"" help:"Dead letter, as list shows it."`
	JSON bool   `name:"json" help:"Write the answer as the gateway sends it, JSON or a stream of events, not its text alone."`
	gatewayFlags
	deadFlags
}

// Help is shown by `trireme dead replay --help`.
func (deadReplayCmd) Help() string {
	return `The request is sent as it was, for the same tenant and class: pictures that had been fetched go along as they were then, and a request
without a seed gets the one that was drawn for it. The letter stays until it is purged or a day old. A replay that fails again
makes a new letter, which names this one.

Examples:
  trireme dead replay mawb3k2xq7f2a
  trireme dead replay mawb3k2xq7f2a --url http://gateway:8080 --json | jq .usage`
}

// Run sends the request again.
func (c *deadReplayCmd) Run(e *env) error {
	if u, err := url.Parse(c.URL); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return fmt.Errorf("%w--url %s is no URL like http://127.0.0.1:8080", errUsage, c.URL)
	}
	var l *wire.DeadLetter
	var body []byte
	err := c.with(e.ctx, func(ctx context.Context, b *bus.Bus) (err error) {
		if l, err = b.Letter(ctx, c.ID); err != nil {
			return explainLetter(err)
		}
		var pictures [][]byte
		if body, pictures, err = b.Request(ctx, l); err != nil {
			return explainLetter(err)
		}
		body, err = selfContained(body, pictures, l.Seed)
		return err
	})
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(e.ctx, http.MethodPost, load.Base(c.URL)+l.Path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("%w%w", errUsage, err)
	}
	for name, value := range l.Headers {
		r.Header.Set(name, value)
	}
	r.Header.Set("Content-Type", "application/json")
	if key := c.key(); key != "" {
		r.Header.Set("Authorization", "Bearer "+key)
	}
	r.Header.Set(wire.HeaderReplayOf, l.ID)
	resp, err := http.DefaultClient.Do(r)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("nothing listens at %s: start it with `trireme up`, or say where with --url", c.URL)
	case err != nil:
		return fmt.Errorf("sending the request again: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return refused(l.ID, resp)
	}
	return c.print(e.out, l.ID, resp)
}

// print writes the answer.
func (c *deadReplayCmd) print(w io.Writer, id string, resp *http.Response) error {
	stream := strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream")
	var err error
	switch {
	case c.JSON:
		_, err = io.Copy(w, resp.Body)
	case stream:
		err = printStream(w, id, resp.Body)
	default:
		err = printAnswer(w, resp.Body)
	}
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	return nil
}

// answer is what chat and plain completions have in common, whole or in pieces.
type answer struct {
	Choices []struct {
		Index   int
		Text    string
		Message struct{ Content string }
		Delta   struct{ Content string }
	}
	Error *struct{ Message string }
}

func printAnswer(w io.Writer, r io.Reader) error {
	var a answer
	if err := json.NewDecoder(r).Decode(&a); err != nil {
		return err
	}
	for i, c := range a.Choices {
		if len(a.Choices) > 1 {
			fmt.Fprintf(w, "choice %d: ", i)
		}
		if _, err := fmt.Fprintln(w, c.Message.Content+c.Text); err != nil {
			return err
		}
	}
	return nil
}

// printStream writes the first choice as it comes, and others behind it.
func printStream(w io.Writer, id string, r io.Reader) error {
	rest := map[int]string{}
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if data, ok := bytes.CutPrefix(bytes.TrimSpace(line), []byte("data: ")); ok && !bytes.Equal(data, []byte("[DONE]")) {
			var a answer
			if err := json.Unmarshal(data, &a); err != nil {
				return err
			}
			if a.Error != nil {
				fmt.Fprintln(w)
				return failedAgain(id, a.Error.Message)
			}
			for _, c := range a.Choices {
				if c.Index > 0 {
					rest[c.Index] += c.Delta.Content + c.Text
				} else if _, err := io.WriteString(w, c.Delta.Content+c.Text); err != nil {
					return err
				}
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	fmt.Fprintln(w)
	for i := range len(rest) {
		if _, err := fmt.Fprintf(w, "choice %d: %s\n", i+1, rest[i+1]); err != nil {
			return err
		}
	}
	return nil
}

// refused is the error of an answer that is none.
func refused(id string, resp *http.Response) error {
	text, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	message := strings.TrimSpace(string(text))
	var a answer
	if json.Unmarshal(text, &a) == nil && a.Error != nil {
		message = a.Error.Message
	}
	if resp.StatusCode >= 500 {
		return failedAgain(id, fmt.Sprintf("%s (%d)", message, resp.StatusCode))
	}
	return fmt.Errorf("the gateway refuses the request: %s (%d)", message, resp.StatusCode)
}

func failedAgain(id, why string) error {
	return fmt.Errorf("it failed again: %s; if that makes a new dead letter, `trireme dead list` shows it, and `trireme dead show` that it is a replay of %s", why, id)
}

// selfContained makes a request independent of what was there when it came: pictures stand in for the http: and https: URLs of
// the body, in the order of their first mention, and seed, if not 0, for one that is missing.
func selfContained(body []byte, pictures [][]byte, seed int64) ([]byte, error) {
	if len(pictures) == 0 && seed == 0 {
		return body, nil
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	var request map[string]any
	if err := d.Decode(&request); err != nil {
		return nil, fmt.Errorf("reading the request's body: %w", err)
	}
	if seed != 0 && request["seed"] == nil {
		request["seed"] = seed
	}
	inline := map[string]string{}
	var missing bool
	replace := func(u any) any {
		from, ok := u.(string)
		if !ok || len(from) >= 5 && strings.EqualFold(from[:5], "data:") {
			return u
		}
		if inline[from] == "" {
			if len(inline) == len(pictures) {
				missing = true
				return u
			}
			p := pictures[len(inline)]
			inline[from] = "data:" + http.DetectContentType(p) + ";base64," + base64.StdEncoding.EncodeToString(p)
		}
		return inline[from]
	}
	messages, _ := request["messages"].([]any)
	for _, m := range messages {
		message, _ := m.(map[string]any)
		parts, _ := message["content"].([]any)
		for _, p := range parts {
			part, _ := p.(map[string]any)
			switch image := part["image_url"].(type) {
			case string:
				part["image_url"] = replace(image)
			case map[string]any:
				image["url"] = replace(image["url"])
			}
		}
	}
	if missing {
		return nil, fmt.Errorf("the request names more pictures than were kept with it: %w", bus.ErrNoRequest)
	}
	return json.Marshal(request)
}
