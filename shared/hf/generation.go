package hf

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
)

// Generation is generation_config.json: what a request that does not say otherwise gets, as vLLM uses the file. A nil
// field is not said there. It does not apply the values; the gateway does.
type Generation struct {
	DoSample          *bool    `json:"do_sample"` // false means greedy, whatever Temperature says
	Temperature       *float64 `json:"temperature"`
	TopP              *float64 `json:"top_p"`
	TopK              *int     `json:"top_k"` // tokens; 0 and -1 mean no limit
	MinP              *float64 `json:"min_p"`
	RepetitionPenalty *float64 `json:"repetition_penalty"`
	MaxNewTokens      *int     `json:"max_new_tokens"`

	EOS []int `json:"-"` // every one of them ends an answer; of config.json where this file names none
	PAD *int  `json:"pad_token_id"`
	BOS *int  `json:"bos_token_id"`
}

// readGeneration reads generation_config.json of dir, which may be absent, and takes token ids that it does not name
// from config.json. vocab bounds the ids.
func readGeneration(dir string, c *configFile, vocab int) (Generation, error) {
	path := filepath.Join(dir, "generation_config.json")
	var file struct {
		Generation
		EOS idList `json:"eos_token_id"`
	}
	if err := readJSON(path, &file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Generation{}, err
	}
	g := file.Generation
	g.EOS = file.EOS
	sources := []*textFile{&c.textFile}
	if c.Text != nil {
		sources = append(sources, c.Text)
	}
	for _, t := range sources {
		if g.EOS == nil {
			g.EOS = t.EOS
		}
		if g.PAD == nil {
			g.PAD = t.PAD
		}
		if g.BOS == nil {
			g.BOS = t.BOS
		}
	}
	for _, id := range g.EOS {
		if id < 0 || id >= vocab {
			return Generation{}, fmt.Errorf("%s: eos_token_id %d is beyond vocab_size %d: %w", path, id, vocab, ErrConfig)
		}
	}
	return g, nil
}
