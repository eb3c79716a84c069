package modelcmd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"trireme.dev/shared/chat"
	"trireme.dev/shared/engine"
)

// ErrGolden is returned by Verify.Run when the folder of reference outputs cannot be used.
var ErrGolden = errors.New("unusable reference outputs")

// goldenCase is one prompt with what a reference implementation made of it.
type goldenCase struct {
	Name     string        `json:"name"`
	Images   []string      `json:"images"`   // file names in the folder
	Messages []messageFile `json:"messages"` // none: the prompt is given as ids only
	Input    []int32       `json:"input_ids"`
	Output   []int32       `json:"output_ids"` // greedy
	Grids    [][3]int      `json:"image_grid_thw"`
	Last     *topLogits    `json:"last_logits_top8"`

	tensors string // path of the safetensors file, "" if the case has none
}

// topLogits are the largest logits behind the prompt, rounded to five decimals.
type topLogits struct {
	IDs    []int     `json:"ids"`
	Values []float64 `json:"values"`
}

// messageFile is a message in OpenAI's form; content is a string or a list of parts.
type messageFile struct {
	Role    string          `json:"role"`
	Content json.RawMessage `json:"content"`
}

// message returns m as the chat template takes it.
func (m *messageFile) message() (chat.Message, error) {
	out := chat.Message{Role: m.Role}
	var text string
	if json.Unmarshal(m.Content, &text) == nil {
		out.Content = []chat.Part{{Type: "text", Text: text}}
		return out, nil
	}
	var parts []struct{ Type, Text string }
	if err := json.Unmarshal(m.Content, &parts); err != nil {
		return out, fmt.Errorf("content of a message: %w: %w", err, ErrGolden)
	}
	for _, p := range parts {
		if p.Type == "image_url" {
			p.Type = "image"
		}
		out.Content = append(out.Content, chat.Part{Type: p.Type, Text: p.Text})
	}
	return out, nil
}

// grids returns the patch grids of the pictures.
func (c *goldenCase) grids() []engine.Grid {
	out := make([]engine.Grid, len(c.Grids))
	for i, g := range c.Grids {
		out[i] = engine.Grid{T: g[0], H: g[1], W: g[2]}
	}
	return out
}

// readGolden reads the cases of a folder of either form: cases.json, a list of named cases with pictures and, where
// present, NAME.safetensors; or golden.json, whose cases[i] belongs to goldenI.safetensors and, where present,
// imageI.png.
func readGolden(dir string) ([]goldenCase, error) {
	path := filepath.Join(dir, "cases.json")
	var cases []goldenCase
	err := readJSON(path, &cases)
	if errors.Is(err, fs.ErrNotExist) {
		path = filepath.Join(dir, "golden.json")
		cases, err = readFamily(dir, path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s: neither cases.json nor golden.json is there: %w", dir, ErrGolden)
		}
	} else if err == nil {
		err = completeCases(dir, cases)
	}
	if err != nil {
		return nil, err
	}
	if len(cases) == 0 {
		return nil, fmt.Errorf("%s: no cases: %w", path, ErrGolden)
	}
	for i := range cases {
		c := &cases[i]
		if len(c.Input) == 0 || len(c.Output) == 0 {
			return nil, fmt.Errorf("%s: case %s has no input_ids or no output_ids: %w", path, c.Name, ErrGolden)
		}
		if c.Last != nil && len(c.Last.IDs) != len(c.Last.Values) {
			return nil, fmt.Errorf("%s: case %s: last_logits_top8 has %d ids and %d values: %w",
				path, c.Name, len(c.Last.IDs), len(c.Last.Values), ErrGolden)
		}
		for j, name := range c.Images {
			if !filepath.IsLocal(name) {
				return nil, fmt.Errorf("%s: case %s: %q is not a file in the folder: %w", path, c.Name, name, ErrGolden)
			}
			c.Images[j] = filepath.Join(dir, name)
		}
	}
	return cases, nil
}

// completeCases finds the tensors of the cases of cases.json.
func completeCases(dir string, cases []goldenCase) error {
	for i := range cases {
		c := &cases[i]
		if c.Name == "" || !filepath.IsLocal(c.Name) {
			return fmt.Errorf("%s: case %d has the name %q: %w", dir, i, c.Name, ErrGolden)
		}
		path := filepath.Join(dir, c.Name+".safetensors")
		switch _, err := os.Stat(path); {
		case err == nil:
			c.tensors = path
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
	}
	return nil
}

// readFamily reads golden.json.
func readFamily(dir, path string) ([]goldenCase, error) {
	var file struct {
		Cases []goldenCase `json:"cases"`
	}
	if err := readJSON(path, &file); err != nil {
		return nil, err
	}
	for i := range file.Cases {
		c := &file.Cases[i]
		c.Name = fmt.Sprintf("golden%d", i)
		c.tensors = filepath.Join(dir, c.Name+".safetensors")
		if image := fmt.Sprintf("image%d.png", i); len(c.Images) == 0 {
			if _, err := os.Stat(filepath.Join(dir, image)); err == nil {
				c.Images = []string{image}
			}
		}
	}
	return file.Cases, nil
}

// readJSON decodes a file into v. A file that is not there is an fs.ErrNotExist.
func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w: %w", path, err, ErrGolden)
	}
	return nil
}
