package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"golang.org/x/term"

	"trireme.dev/services/trireme/load"
)

// chatCmd asks a running gateway.
type chatCmd struct {
	Question  string   `arg:"" optional:"" help:"What to ask. Without it, on a terminal: a conversation; else it is read from stdin."`
	Image     []string `help:"Picture: a file or a URL. May be repeated." placeholder:"FILE|URL"`
	Model     string   `name:"model" help:"Model name; by default the gateway's first." placeholder:"NAME" env:"-"` // TRIREME_MODEL is a folder
	MaxTokens int64    `help:"Tokens of an answer at most; 0: the rest of the context."`
	Seed      *int64   `help:"Seed of the random draws." placeholder:"N"`
	Temp      *float64 `name:"temperature" help:"0 is greedy; by default the model's own." placeholder:"T"`
	JSON      bool     `name:"json" help:"Write one JSON object with answer, usage and times."`
	gatewayFlags
}

// Help is shown by `trireme chat --help`.
func (chatCmd) Help() string {
	return `Examples:
  trireme chat --image docs/shapes.png "What is this?"
  trireme chat --image a.png --image b.png "Describe each image."
  trireme chat                                 a conversation; an empty line or Ctrl-D ends it
  echo "Count from 3 to 9." | trireme chat --json
  trireme chat --url https://models.example.com --api-key sk-1 "What is this?"`
}

// reply is one answer with its figures.
type reply struct {
	Answer           string  `json:"answer"`
	FinishReason     string  `json:"finish_reason"`
	PromptTokens     int64   `json:"prompt_tokens"`
	CompletionTokens int64   `json:"completion_tokens"`
	TTFT             float64 `json:"ttft_seconds"`
	Total            float64 `json:"total_seconds"`
	Rate             float64 `json:"tokens_per_second"` // of the tokens after the first
}

// Run asks one question, or holds a conversation.
func (c *chatCmd) Run(e *env) error {
	if u, err := url.Parse(c.URL); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return fmt.Errorf("%w--url %s is no URL like http://127.0.0.1:8080", errUsage, c.URL)
	}
	if c.MaxTokens < 0 {
		return fmt.Errorf("%w--max-tokens %d cannot be negative", errUsage, c.MaxTokens)
	}
	options := []option.RequestOption{option.WithBaseURL(load.Base(c.URL) + "/v1"), option.WithMaxRetries(0)}
	if key := c.key(); key != "" {
		options = append(options, option.WithAPIKey(key))
	}
	client := openai.NewClient(options...)
	p := openai.ChatCompletionNewParams{Model: c.Model, StreamOptions: openai.ChatCompletionStreamOptionsParam{IncludeUsage: openai.Bool(true)}}
	if c.MaxTokens > 0 {
		p.MaxTokens = openai.Int(c.MaxTokens)
	}
	if c.Seed != nil {
		p.Seed = openai.Int(*c.Seed)
	}
	if c.Temp != nil {
		p.Temperature = openai.Float(*c.Temp)
	}
	var parts []openai.ChatCompletionContentPartUnionParam
	for _, image := range c.Image {
		url, err := pictureURL(image)
		if err != nil {
			return err
		}
		parts = append(parts, openai.ImageContentPart(openai.ChatCompletionContentPartImageImageURLParam{URL: url}))
	}
	if c.Model == "" {
		models, err := client.Models.List(e.ctx)
		if err != nil {
			return c.explain(err)
		}
		if len(models.Data) == 0 {
			return fmt.Errorf("the gateway at %s serves no model", c.URL)
		}
		p.Model = models.Data[0].ID
	}
	ask, err := c.questions(e)
	if err != nil {
		return err
	}
	for {
		question, more, err := ask()
		if question == "" || err != nil {
			return err
		}
		p.Messages = append(p.Messages, openai.UserMessage(append(parts, openai.TextContentPart(question))))
		parts = nil
		r, err := c.ask(e, client, p)
		if err != nil {
			return c.explain(err)
		}
		if c.JSON {
			if err := json.NewEncoder(e.out).Encode(r); err != nil {
				return err
			}
		} else {
			fmt.Fprintf(e.err, "%d prompt tokens, %d tokens, TTFT %.0f ms, %.0f tokens/s\n", r.PromptTokens, r.CompletionTokens,
				r.TTFT*1000, r.Rate)
		}
		if !more {
			return nil
		}
		p.Messages = append(p.Messages, openai.AssistantMessage(r.Answer))
	}
}

// questions returns what gives the next question, empty at the end, and says whether there may be another one: on a terminal one a
// line, else the argument or all of stdin.
func (c *chatCmd) questions(e *env) (next func() (question string, more bool, err error), err error) {
	if c.Question == "" && isTerminal(e.in) {
		lines := bufio.NewScanner(e.in)
		lines.Buffer(nil, mostQuestion)
		return func() (string, bool, error) {
			fmt.Fprint(e.err, "> ")
			read := make(chan struct{})
			go func() {
				lines.Scan()
				close(read)
			}()
			select { // a signal ends the wait, but not the read
			case <-read:
				return strings.TrimSpace(lines.Text()), true, lines.Err()
			case <-e.ctx.Done():
				return "", false, e.ctx.Err()
			}
		}, nil
	}
	question := c.Question
	if question == "" {
		all, err := io.ReadAll(io.LimitReader(e.in, mostQuestion+1))
		if err != nil {
			return nil, fmt.Errorf("reading the question: %w", err)
		}
		if len(all) > mostQuestion {
			return nil, fmt.Errorf("%wthe question on stdin has more than %d bytes", errUsage, mostQuestion)
		}
		question = strings.TrimSuffix(string(all), "\n")
	}
	if strings.TrimSpace(question) == "" {
		return nil, fmt.Errorf("%wno question: give one, as in: trireme chat --image x.png \"What is this?\"", errUsage)
	}
	return func() (string, bool, error) { return question, false, nil }, nil
}

// mostQuestion is the most bytes of a question that is read.
const mostQuestion = 1 << 20

// ask streams one answer to the output.
func (c *chatCmd) ask(e *env, client openai.Client, p openai.ChatCompletionNewParams) (*reply, error) {
	begin := time.Now()
	stream := client.Chat.Completions.NewStreaming(e.ctx, p)
	defer stream.Close()
	r := &reply{}
	var first time.Duration
	for stream.Next() {
		chunk := stream.Current()
		if chunk.Usage.TotalTokens > 0 {
			r.PromptTokens, r.CompletionTokens = chunk.Usage.PromptTokens, chunk.Usage.CompletionTokens
		}
		for _, ch := range chunk.Choices {
			if ch.FinishReason != "" {
				r.FinishReason = ch.FinishReason
			}
			if ch.Delta.Content == "" {
				continue
			}
			if first == 0 {
				first = time.Since(begin)
			}
			r.Answer += ch.Delta.Content
			if !c.JSON {
				fmt.Fprint(e.out, ch.Delta.Content)
			}
		}
	}
	if err := stream.Err(); err != nil {
		if !c.JSON && r.Answer != "" {
			fmt.Fprintln(e.out) // the error gets a line of its own
		}
		return nil, err
	}
	if !c.JSON {
		fmt.Fprintln(e.out)
	}
	total := time.Since(begin)
	r.TTFT, r.Total = first.Seconds(), total.Seconds()
	if after := (total - first).Seconds(); after > 0 && r.CompletionTokens > 1 {
		r.Rate = float64(r.CompletionTokens-1) / after
	}
	return r, nil
}

// explain turns an error of the client into one with the remedy.
func (c *chatCmd) explain(err error) error {
	var api *openai.Error
	switch {
	case errors.As(err, &api) && api.StatusCode == http.StatusUnauthorized:
		return fmt.Errorf("%s wants another API key, or one at all: give it with --api-key, TRIREME_API_KEY or OPENAI_API_KEY (%d)", c.URL, api.StatusCode)
	case errors.As(err, &api) && api.Message != "":
		return fmt.Errorf("%s (%d)", api.Message, api.StatusCode)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("nothing listens at %s: start it with `trireme up`, or say where with --url", c.URL)
	case errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &api) && api.StatusCode == http.StatusNotFound:
		return fmt.Errorf("%s is a server, but not one with OpenAI's API: it answers 404; say with --url where the gateway is", c.URL)
	// The other one is what net/http says of a server that speaks first, as NATS does, and is heard before it was asked anything.
	case strings.Contains(err.Error(), "malformed HTTP"), strings.Contains(err.Error(), "readLoopPeekFailLocked: %!w(<nil>)"):
		return fmt.Errorf("what listens at %s does not speak HTTP: say with --url where the gateway is", c.URL)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("%s closed the connection before the answer was complete: it has stopped or was started again; ask once more", c.URL)
	}
	return fmt.Errorf("asking %s: %w", c.URL, err)
}

// pictureURL passes URLs on and turns a file into a data URL.
func pictureURL(image string) (string, error) {
	for _, scheme := range []string{"http://", "https://", "data:"} {
		if strings.HasPrefix(image, scheme) {
			return image, nil
		}
	}
	data, err := os.ReadFile(image)
	if err != nil {
		return "", fmt.Errorf("%wreading the picture: %w", errUsage, err)
	}
	return "data:" + http.DetectContentType(data) + ";base64," + base64.StdEncoding.EncodeToString(data), nil
}

func isTerminal(f any) bool {
	file, ok := f.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}
