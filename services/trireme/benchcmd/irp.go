package benchcmd

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/trireme/load"
	"trireme.dev/shared/npu/pace"
	"trireme.dev/shared/obs"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/wire"
)

// IRP is `trireme bench irp`.
type IRP struct {
	Pace     string `help:"Profile of the NPUs: ${profiles}, or a file FILE.yaml." default:"epd-minicpm-a100" placeholder:"NAME"`
	Encoders int    `help:"Encoders that share a request's pictures." default:"4"`
	Pictures []int  `help:"Pictures of a request." default:"2,4,8"`
	Requests int    `help:"Requests of each kind, one after the other." default:"5"`
	JSON     bool   `name:"json" help:"Write one JSON object instead of a table."`
}

// Help is shown by `trireme bench irp --help`.
func (IRP) Help() string {
	return `Intra-request parallelism: what it brings that a request's pictures are encoded by all encoders that are idle (EPD,
arXiv:2501.05460, table 4). NPUs are paced, so that several of them behave as such on a few cores. Requests come one after the
other, and no cache helps; without the parallelism a request has one encoder, so that run has one. Times are medians, to when the
last picture is encoded and to the first token.

Examples:
  trireme bench irp
  trireme bench irp --encoders 8 --pictures 1,2,4,8,16
  trireme bench irp --pace mine.yaml --json`
}

// IRPReport is what IRP writes with --json.
type IRPReport struct {
	Version  string   `json:"version"`
	Paced    string   `json:"paced"`  // the profile: figures are of its NPUs
	Source   string   `json:"source"` // of the profile
	Encoders int      `json:"encoders"`
	Rows     []IRPRow `json:"rows"`
}

// IRPRow is one number of pictures. Times are medians in milliseconds.
type IRPRow struct {
	Pictures int     `json:"pictures"`
	OneMM    float64 `json:"one_encoder_mm_ms"` // to the last picture's MM tokens
	AllMM    float64 `json:"all_encoders_mm_ms"`
	MM       float64 `json:"mm_ratio"`
	IdealMM  float64 `json:"ideal_mm_ratio"` // by the profile alone: pictures to rounds of them
	OneTTFT  float64 `json:"one_encoder_ttft_ms"`
	AllTTFT  float64 `json:"all_encoders_ttft_ms"`
	TTFT     float64 `json:"ttft_ratio"`
}

// side is the size of the pictures: the largest that the bundled model does not shrink.
const side = 256

// Run measures and prints.
func (c *IRP) Run(e Env) error {
	if c.Encoders < 1 || c.Encoders > 32 || c.Requests < 1 || len(c.Pictures) == 0 || slices.Min(c.Pictures) < 1 || slices.Max(c.Pictures) > 64 {
		return fmt.Errorf("--encoders 1 to 32, --pictures 1 to 64, --requests at least 1%w", ErrUsage)
	}
	profile, err := pace.Load(c.Pace)
	if err != nil {
		return fmt.Errorf("--pace: %w", err)
	}
	next, end := progress(e.Err, 2*len(c.Pictures))
	defer end()
	r := &IRPReport{Version: obs.Version(), Paced: profile.Name, Source: profile.Source, Encoders: c.Encoders}
	took := make(map[int][]times) // by encoders
	for _, encoders := range []int{c.Encoders, 1} {
		topology := fmt.Sprintf("%dE1P1D", encoders)
		err := onFleet(e, topology, c.Pace, []string{"--mm-cache", "0", "--kv-cache", "0"}, func(f *fleet) error {
			for _, n := range c.Pictures {
				next(fmt.Sprintf("%s, %d pictures", topology, n))
				t, err := c.measure(f, n)
				if err != nil {
					return fmt.Errorf("%s, requests of %d pictures: %w", topology, n, err)
				}
				took[encoders] = append(took[encoders], t)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for i, n := range c.Pictures {
		one, all := took[1][i], took[c.Encoders][i]
		rounds := (n + c.Encoders - 1) / c.Encoders
		r.Rows = append(r.Rows, IRPRow{
			Pictures: n, OneMM: one.mm, AllMM: all.mm, MM: one.mm / all.mm, IdealMM: float64(n) / float64(rounds),
			OneTTFT: one.ttft, AllTTFT: all.ttft, TTFT: one.ttft / all.ttft,
		})
	}
	return write(e.Out, c.JSON, r)
}

// times are medians in milliseconds.
type times struct{ mm, ttft float64 }

// measure sends requests of n pictures that nobody has seen.
func (c *IRP) measure(f *fleet, n int) (times, error) {
	conn, err := nats.Connect(f.nats)
	if err != nil {
		return times{}, fmt.Errorf("watching for encoded pictures: %w", err)
	}
	defer conn.Close()
	encoded := make(chan *nats.Msg, 64) // the prefill message is published when the last picture is there
	if _, err := conn.ChanSubscribe(wire.StageSubjects(stage.Prefill), encoded); err != nil {
		return times{}, fmt.Errorf("watching for encoded pictures: %w", err)
	}
	if err := conn.Flush(); err != nil {
		return times{}, fmt.Errorf("watching for encoded pictures: %w", err)
	}
	client := newStreamer(f.url)
	defer client.http.CloseIdleConnections()
	var mm, ttft []float64
	for i := range c.Requests + 1 { // the first one warms up
		body, err := picturesBody(n, uint64(n*1000+i))
		if err != nil {
			return times{}, err
		}
		at := make(chan time.Time, 1)
		go func() {
			select {
			case <-encoded:
				at <- time.Now()
			case <-f.ctx.Done():
			}
		}()
		a, err := client.ask(f.ctx, body, 2, nil)
		if err != nil {
			return times{}, err
		}
		select {
		case t := <-at:
			if i > 0 {
				mm, ttft = append(mm, millis(t.UnixNano()-a.sent)), append(ttft, millis(a.tokens[0]-a.sent))
			}
		case <-time.After(stopping):
			return times{}, errors.New("an answer came, but no prefill message was seen")
		}
	}
	return times{quantile(mm, 0.5), quantile(ttft, 0.5)}, nil
}

// picturesBody is a request with n different pictures.
func picturesBody(n int, seed uint64) ([]byte, error) {
	var content []any
	for i := range n {
		url, err := load.Picture(load.Size{W: side, H: side}, seed<<8+uint64(i))
		if err != nil {
			return nil, err
		}
		content = append(content, map[string]any{"type": "image_url", "image_url": map[string]any{"url": url}})
	}
	return body(append(content, map[string]any{"type": "text", "text": "Describe the images."}), 2), nil
}

func (r *IRPReport) writeTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintf(t, "PICTURES\tALL ENCODED, 1 ENCODER ms\t%d ENCODERS ms\tRATIO\tIDEAL\tTTFT, 1 ENCODER ms\t%d ENCODERS ms\tRATIO\n", r.Encoders, r.Encoders)
	for _, x := range r.Rows {
		fmt.Fprintf(t, "%d\t%.0f\t%.0f\t%.2f\t%.2f\t%.0f\t%.0f\t%.2f\n", x.Pictures, x.OneMM, x.AllMM, x.MM, x.IdealMM, x.OneTTFT, x.AllTTFT, x.TTFT)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "NPUs paced as %s (%s); ideal: pictures to rounds of %d\n", r.Paced, r.Source, r.Encoders)
	return err
}
