package modelcmd

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"trireme.dev/shared/token"
)

// Tokenize is `trireme model tokenize`: JSON strings in, one a line, JSON arrays of token ids out, or the reverse.
// Special tokens that stand in the text become their ids. Every answer is written before the next line is read; empty
// lines are passed over.
type Tokenize struct {
	Dir    string `arg:"" help:"Model folder, or any folder with a tokenizer.json." type:"path"`
	Decode bool   `help:"The reverse: JSON arrays of token ids in, JSON strings out."`
}

// Help is shown by `trireme model tokenize --help`.
func (Tokenize) Help() string {
	return `Special tokens that stand in the text become their ids.

Examples:
  echo '"Hello!"' | trireme model tokenize models/shapes-vl-moe
  echo '[450,0]' | trireme model tokenize models/shapes-vl-moe --decode`
}

// Run reads s.In to its end. It returns an error that names the line when one is not what it should be.
func (c *Tokenize) Run(s Streams) error {
	t, err := token.Load(c.Dir)
	if err != nil {
		return err
	}
	answer := func(line []byte) (any, error) {
		var text string
		if err := json.Unmarshal(line, &text); err != nil {
			return nil, fmt.Errorf("want a JSON string: %w", err)
		}
		return t.Encode(text)
	}
	if c.Decode {
		answer = func(line []byte) (any, error) {
			var ids []int
			if err := json.Unmarshal(line, &ids); err != nil {
				return nil, fmt.Errorf("want a JSON array of token ids: %w", err)
			}
			for _, id := range ids {
				if _, _, ok := t.Token(id); !ok {
					return nil, fmt.Errorf("no token has the id %d", id)
				}
			}
			return t.Decode(ids, false), nil
		}
	}
	in := bufio.NewReader(s.In)
	out := json.NewEncoder(s.Out)
	out.SetEscapeHTML(false)
	for number := 1; ; number++ {
		line, err := in.ReadBytes('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("line %d: %w", number, err)
		}
		if len(bytes.TrimSpace(line)) > 0 {
			v, err := answer(line)
			if err != nil {
				return fmt.Errorf("line %d: %w", number, err)
			}
			if err := out.Encode(v); err != nil {
				return fmt.Errorf("writing: %w", err)
			}
		}
		if err != nil {
			return nil
		}
	}
}
