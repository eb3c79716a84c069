// Package pace slows an NPU down to the rates of another one, so that many NPUs on a few processors behave as a fleet of
// those: every step and every picture takes the time that a profile says, most of it asleep. What is computed stays real,
// bit for bit; only when it is there changes. Figures taken on paced NPUs are the profile's and say so wherever they appear.
//
// Modelled: how long the NPU is busy with a step, by what the step is made of, and with a picture. Not modelled, and so at the
// host's own speed: picture decoding, tokenising, messages, memory (allocation, mapping, copies between domains and nodes),
// NPUs that share anything with one another, and loading. An NPU cannot be paced to be faster than the host's share for it: a
// step that takes the host longer than the profile says takes as long, and is counted (Compute.Behind).
package pace

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"gopkg.in/yaml.v3"

	"trireme.dev/shared/kernel"
)

// ErrProfile is wrapped by errors of profiles that cannot be used.
var ErrProfile = errors.New("invalid profile of a paced NPU")

// Profile says how long an NPU is busy. All times are in milliseconds and at least 0.
type Profile struct {
	Name    string  `yaml:"name"`   // what outputs are labelled with
	Source  string  `yaml:"source"` // where the figures are from
	Encode  Encode  `yaml:"encode"`
	Prefill Prefill `yaml:"prefill"`
	Decode  Decode  `yaml:"decode"`
	Copy    Copy    `yaml:"copy"`
	Memory  Memory  `yaml:"memory"`
}

// Encode is what a picture costs: Picture + Token for each of its multimodal tokens.
type Encode struct {
	Picture float64 `yaml:"picture_ms"`
	Token   float64 `yaml:"token_ms"`
}

// Prefill is what prompt tokens cost in a step (the form of DistServe's simulator, simdistserve).
type Prefill struct {
	Step         float64  `yaml:"step_ms"`          // for a step that has any
	Token        float64  `yaml:"token_ms"`         // for each token
	PictureToken *float64 `yaml:"picture_token_ms"` // for each that is of a picture; absent: as others
	Pairs        float64  `yaml:"million_pairs_ms"` // for each million pairs of a token and one that it attends to
}

// Decode is what sequences cost that take one token in a step (likewise).
type Decode struct {
	Step     float64 `yaml:"step_ms"`                   // for a step that has any
	Sequence float64 `yaml:"sequence_ms"`               // for each
	Context  float64 `yaml:"thousand_context_ms"`       // for each thousand tokens that they attend to
	Large    int     `yaml:"large_sequences"`           // from so many on the next two count; 0: never
	LargeSeq float64 `yaml:"large_sequence_ms"`         // in place of Sequence
	LargeFix float64 `yaml:"large_step_ms"`             // in place of Step
	LargeCtx float64 `yaml:"large_thousand_context_ms"` // in place of Context
}

// Copy is the milliseconds of copies from another memory domain, by what they are of: a model's NPU has other bytes for that than
// the model that is run. 0: as long as it takes the host.
type Copy struct {
	KV      float64 `yaml:"kv_token_ms"`      // for the keys and values of each token
	Picture float64 `yaml:"picture_token_ms"` // for each token of an encoded picture
}

// Memory is what there is room for on an NPU, in GB of 10^9 bytes, for what is simulated; a paced NPU has the memory that the HMM gives it.
// Absent: room for anything.
type Memory struct {
	NPU     float64 `yaml:"npu_gb"`      // that weights and KV may take
	Vision  float64 `yaml:"vision_gb"`   // weights of who encodes
	Text    float64 `yaml:"text_gb"`     // weights of who computes prompts or decodes, on each NPU
	Experts float64 `yaml:"experts_gb"`  // likewise, shared by the NPUs of an instance
	KVToken float64 `yaml:"kv_token_mb"` // keys and values of a token, in MB
}

// Room is the tokens of KV for which an NPU of an instance with so many has memory beside its weights, 0: any number, and whether these fit. roles
// are letters of E, P and D.
func (m *Memory) Room(roles string, npus int) (tokens int, fits bool) {
	if m.NPU == 0 {
		return 0, true
	}
	free := m.NPU
	if strings.Contains(roles, "E") {
		free -= m.Vision
	}
	if !strings.ContainsAny(roles, "PD") {
		return 0, free >= 0
	}
	if free -= m.Text + m.Experts/float64(npus); m.KVToken == 0 {
		return 0, free >= 0
	}
	tokens = int(1e3 * free / m.KVToken)
	return tokens, tokens > 0
}

//go:embed profiles
var files embed.FS

// Names are the names of the profiles that are built in.
func Names() []string {
	entries, err := fs.ReadDir(files, "profiles")
	if err != nil {
		panic("BUG: embedded profiles: " + err.Error())
	}
	var names []string
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), ".yaml"))
	}
	slices.Sort(names)
	return names
}

// Load returns the built-in profile of a name, or reads a file whose name has a slash or ends in .yaml.
func Load(name string) (*Profile, error) {
	var data []byte
	var err error
	if file := strings.Contains(name, "/") || strings.HasSuffix(name, ".yaml"); file {
		data, err = os.ReadFile(name)
	} else if data, err = files.ReadFile(path.Join("profiles", name+".yaml")); err != nil {
		return nil, fmt.Errorf("%w: there is no %q; built in are %s, others are files whose name ends in .yaml",
			ErrProfile, name, strings.Join(Names(), ", "))
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProfile, err)
	}
	p := new(Profile)
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	if err := d.Decode(p); err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrProfile, name, err)
	}
	if err := p.check(); err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrProfile, name, err)
	}
	return p, nil
}

// The longest time in a profile is a minute, the most memory some racks'.
const (
	maxMS = 60e3
	maxGB = 1e5
)

func (p *Profile) check() error {
	if p.Name == "" || p.Source == "" {
		return errors.New("it needs a name, which figures are labelled with, and a source of its own figures")
	}
	picture := 0.0
	if p.Prefill.PictureToken != nil {
		picture = *p.Prefill.PictureToken
	}
	for _, ms := range []float64{
		p.Encode.Picture, p.Encode.Token, p.Prefill.Step, p.Prefill.Token, picture, p.Prefill.Pairs,
		p.Decode.Step, p.Decode.Sequence, p.Decode.Context, p.Decode.LargeFix, p.Decode.LargeSeq, p.Decode.LargeCtx,
		p.Copy.KV, p.Copy.Picture,
	} {
		if !(ms >= 0 && ms <= maxMS) {
			return fmt.Errorf("a time of %g ms: there are 0 to %g", ms, maxMS)
		}
	}
	for _, gb := range []float64{p.Memory.NPU, p.Memory.Vision, p.Memory.Text, p.Memory.Experts, p.Memory.KVToken} {
		if !(gb >= 0 && gb <= maxGB) {
			return fmt.Errorf("memory of %g GB, or MB: there are 0 to %g", gb, float64(maxGB))
		}
	}
	switch {
	case p.Encode == Encode{}:
		return errors.New("encode: a picture takes no time")
	case p.Prefill.Step+p.Prefill.Token == 0:
		return errors.New("prefill: a prompt takes no time")
	case p.Decode.Step+p.Decode.Sequence == 0:
		return errors.New("decode: a token takes no time")
	case p.Decode.Large < 0 || p.Decode.Large > 0 && p.Decode.LargeFix+p.Decode.LargeSeq == 0:
		return fmt.Errorf("decode: a token in a step of %d sequences takes no time", p.Decode.Large)
	}
	return nil
}

// Cost is how long an NPU is busy with w. In a step that has both prompts and sequences that decode, the longer of the two
// fixed times counts once: it is for the most part the time to read the weights.
func (p *Profile) Cost(w kernel.Work) time.Duration {
	var fixed, ms float64
	if w.Prompt > 0 {
		fixed = p.Prefill.Step
		picture := p.Prefill.Token
		if p.Prefill.PictureToken != nil {
			picture = *p.Prefill.PictureToken
		}
		ms += float64(w.Prompt-w.Visual)*p.Prefill.Token + float64(w.Visual)*picture + float64(w.Pairs)/1e6*p.Prefill.Pairs
	}
	if w.Decoding > 0 {
		d := &p.Decode
		step, seq, ctx := d.Step, d.Sequence, d.Context
		if d.Large > 0 && w.Decoding >= d.Large {
			step, seq, ctx = d.LargeFix, d.LargeSeq, d.LargeCtx
		}
		fixed = max(fixed, step)
		ms += float64(w.Decoding)*seq + float64(w.Context)/1e3*ctx
	}
	if w.Parts > 0 {
		ms += (p.Encode.Picture + float64(w.Tokens)*p.Encode.Token) / float64(w.Parts)
	}
	return time.Duration((fixed + ms) * float64(time.Millisecond))
}

// CopyCost is the time of a copy of so many tokens' keys and values, and of so many tokens of encoded pictures, that nothing else
// travels beside.
func (p *Profile) CopyCost(tokens, visual int) time.Duration {
	return time.Duration((float64(tokens)*p.Copy.KV + float64(visual)*p.Copy.Picture) * float64(time.Millisecond))
}
