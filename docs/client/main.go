// Command client asks a running Trireme about a picture with the official OpenAI client and streams the answer.
//
//	go run ./docs/client docs/shapes.png "Describe the image."
//
// OPENAI_BASE_URL names another gateway than http://127.0.0.1:8080/v1, OPENAI_API_KEY its key if it wants one.
package main

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"os"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: client PICTURE QUESTION")
		os.Exit(2)
	}
	if err := ask(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func ask(picture, question string) error {
	data, err := os.ReadFile(picture)
	if err != nil {
		return err
	}
	url := "data:" + http.DetectContentType(data) + ";base64," + base64.StdEncoding.EncodeToString(data)
	base := cmp.Or(os.Getenv("OPENAI_BASE_URL"), "http://127.0.0.1:8080/v1")
	client := openai.NewClient(option.WithBaseURL(base), option.WithAPIKey(cmp.Or(os.Getenv("OPENAI_API_KEY"), "none")))
	stream := client.Chat.Completions.NewStreaming(context.Background(), openai.ChatCompletionNewParams{
		Model: "shapes-vl-moe",
		Messages: []openai.ChatCompletionMessageParamUnion{
			openai.UserMessage([]openai.ChatCompletionContentPartUnionParam{
				openai.ImageContentPart(openai.ChatCompletionContentPartImageImageURLParam{URL: url}),
				openai.TextContentPart(question),
			}),
		},
	})
	for stream.Next() {
		if chunk := stream.Current(); len(chunk.Choices) > 0 {
			fmt.Print(chunk.Choices[0].Delta.Content)
		}
	}
	fmt.Println()
	if e := (*openai.Error)(nil); errors.As(stream.Err(), &e) && e.Message != "" { // which its text leaves out
		return fmt.Errorf("%s (%d)", e.Message, e.StatusCode)
	}
	return stream.Err()
}
