package load

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"math/rand/v2"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"
)

// Span is a range of whole numbers, both ends included; each is as likely. Its text is N or N-M.
type Span struct{ Min, Max int }

// UnmarshalText reads N or N-M.
func (s *Span) UnmarshalText(text []byte) error {
	low, high, ranged := strings.Cut(string(text), "-")
	var err, err2 error
	s.Min, err = strconv.Atoi(low)
	if s.Max = s.Min; ranged {
		s.Max, err2 = strconv.Atoi(high)
	}
	if err == nil && err2 == nil && s.Min >= 0 && s.Max < s.Min {
		return fmt.Errorf("%q: the smaller number comes first, as in %d-%d", text, s.Max, s.Min)
	}
	if err != nil || err2 != nil || s.Min < 0 {
		return fmt.Errorf("%q is neither a number nor a range like 1-16", text)
	}
	return nil
}

// MarshalText is the reverse.
func (s Span) MarshalText() ([]byte, error) {
	if s.Min == s.Max {
		return strconv.AppendInt(nil, int64(s.Min), 10), nil
	}
	return fmt.Appendf(nil, "%d-%d", s.Min, s.Max), nil
}

func (s Span) draw(r *rand.Rand) int { return s.Min + r.IntN(s.Max-s.Min+1) }

// Size is the size of a picture in pixels. Its text is WIDTHxHEIGHT.
type Size struct{ W, H int }

// UnmarshalText reads WIDTHxHEIGHT.
func (s *Size) UnmarshalText(text []byte) error {
	w, h, ok := strings.Cut(string(text), "x")
	var err, err2 error
	s.W, err = strconv.Atoi(w)
	s.H, err2 = strconv.Atoi(h)
	if !ok || err != nil || err2 != nil || s.W < 1 || s.H < 1 || s.W > 1<<14 || s.H > 1<<14 {
		return fmt.Errorf("%q is no size of a picture like 224x224", text)
	}
	return nil
}

// MarshalText is the reverse.
func (s Size) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%dx%d", s.W, s.H), nil }

// Shape is what requests are like. All are different, so that no cache of the server helps, but for what Repeat says.
type Shape struct {
	Words    Span     // of the question
	Output   Span     // tokens of the answer; the server is told to go on past its stop tokens (ignore_eos) unless Stop
	Stop     bool     // let the model end its answers; Output is then the most
	Pictures Span     // of a request
	Sizes    []Size   // of pictures, drawn from with equal chance
	Repeat   float64  // chance, 0 to 1, that a picture is one of a few that many requests have
	Question string   // "": random words
	System   string   // a system message that all requests begin with; "": none
	Prefixes int      // system messages that are drawn from, each as likely; 0: none but System
	Prefix   int      // words of each of them
	Extra    []string // fields of the request as NAME=JSON, e.g. temperature=0
}

// Validate reports what is wrong with the shape.
func (s *Shape) Validate() error {
	var errs []error
	if s.Output.Min < 1 {
		errs = append(errs, errors.New("an answer has at least one token"))
	}
	if s.Words.Min < 1 && s.Question == "" {
		errs = append(errs, errors.New("a question has at least one word"))
	}
	if s.Pictures.Max > 0 && len(s.Sizes) == 0 {
		errs = append(errs, errors.New("pictures need a size"))
	}
	if !(s.Repeat >= 0 && s.Repeat <= 1) {
		errs = append(errs, fmt.Errorf("a chance of %g that a picture repeats: it must be 0 to 1", s.Repeat))
	}
	if s.Prefixes < 0 || s.Prefix < 0 || (s.Prefixes > 0) != (s.Prefix > 0) || s.Prefixes > 0 && s.System != "" {
		errs = append(errs, errors.New("system messages need a number and a number of words, and are drawn or given, not both"))
	}
	for _, e := range s.Extra {
		name, value, ok := strings.Cut(e, "=")
		if !ok || name == "" || !json.Valid([]byte(value)) {
			errs = append(errs, fmt.Errorf("extra field %q is not NAME=JSON, as in temperature=0", e))
		}
	}
	return errors.Join(errs...)
}

// popular is how many pictures the repeated ones are drawn from.
const popular = 8

// bodies makes n requests. Request i depends on seed and i only.
func (s *Shape) bodies(ctx context.Context, model string, seed uint64, n int) ([][]byte, error) {
	out := make([][]byte, n)
	g, going := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i := range out {
		if going.Err() != nil {
			break
		}
		g.Go(func() (err error) {
			out[i], err = s.body(model, seed, i)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("making requests: %w", err)
	}
	return out, ctx.Err()
}

// Where the random streams of requests and of system messages begin, beside that of arrivals.
const (
	requestStream = 1 << 32
	prefixStream  = 1 << 33
)

// PicturesOf is how many pictures request i has; those of the warm-up come first.
func (s *Shape) PicturesOf(seed uint64, i int) int {
	return s.Pictures.draw(rand.New(rand.NewPCG(seed, requestStream+uint64(i))))
}

func (s *Shape) body(model string, seed uint64, i int) ([]byte, error) {
	r := rand.New(rand.NewPCG(seed, requestStream+uint64(i)))
	var parts []any
	for range s.Pictures.draw(r) {
		size, draw := s.Sizes[r.IntN(len(s.Sizes))], r.Uint64()
		if r.Float64() < s.Repeat {
			draw = seed + uint64(r.IntN(popular))
		}
		url, err := Picture(size, draw)
		if err != nil {
			return nil, err
		}
		parts = append(parts, map[string]any{"type": "image_url", "image_url": map[string]string{"url": url}})
	}
	question := s.Question
	if question == "" {
		question = sentence(r, s.Words.draw(r))
	}
	parts = append(parts, map[string]any{"type": "text", "text": question})
	var messages []any
	system := s.System
	if s.Prefixes > 0 {
		system = sentence(rand.New(rand.NewPCG(seed, prefixStream+uint64(r.IntN(s.Prefixes)))), s.Prefix)
	}
	if system != "" {
		messages = append(messages, map[string]any{"role": "system", "content": system})
	}
	messages = append(messages, map[string]any{"role": "user", "content": parts})
	m := map[string]any{
		"model": model, "messages": messages, "max_tokens": s.Output.draw(r),
		"stream": true, "stream_options": map[string]bool{"include_usage": true},
	}
	if !s.Stop {
		m["ignore_eos"] = true // vLLM's and Trireme's; a server that knows it not ends where it likes
	}
	for _, e := range s.Extra {
		name, value, _ := strings.Cut(e, "=")
		m[name] = json.RawMessage(value)
	}
	return json.Marshal(m)
}

var words = strings.Fields(`apple river stone seven light green under window paper music little circle garden yellow
	morning seldom copper distant winter planet harbor square silver letter pocket forest bridge number purple answer`)

func sentence(r *rand.Rand, n int) string {
	picked := make([]string, n)
	for i := range picked {
		picked[i] = words[r.IntN(len(words))]
	}
	return strings.Join(picked, " ") + "?"
}

// Picture draws some coloured rectangles as a data URL of a PNG.
func Picture(size Size, draw uint64) (string, error) {
	r := rand.New(rand.NewPCG(draw, 0))
	shade := func() color.RGBA { return color.RGBA{uint8(r.Uint32()), uint8(r.Uint32()), uint8(r.Uint32()), 255} }
	palette := color.Palette{shade(), shade(), shade(), shade()}
	img := image.NewPaletted(image.Rect(0, 0, size.W, size.H), palette)
	for k := range uint8(3) {
		a, b := image.Pt(r.IntN(size.W), r.IntN(size.H)), image.Pt(r.IntN(size.W), r.IntN(size.H))
		box := image.Rectangle{Min: a, Max: b}.Canon()
		for y := box.Min.Y; y < box.Max.Y; y++ {
			row := img.Pix[y*img.Stride+box.Min.X : y*img.Stride+box.Max.X]
			for x := range row {
				row[x] = k + 1
			}
		}
	}
	var b bytes.Buffer
	b.WriteString("data:image/png;base64,")
	enc := base64.NewEncoder(base64.StdEncoding, &b)
	if err := png.Encode(enc, img); err != nil {
		return "", fmt.Errorf("drawing a picture of %dx%d: %w", size.W, size.H, err)
	}
	if err := enc.Close(); err != nil {
		return "", err
	}
	return b.String(), nil
}
