package modelcmd

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/schollz/progressbar/v3"

	"trireme.dev/shared/hf"
	"trireme.dev/shared/npu"
)

// ErrDiffers is returned by Verify.Run when a case does not agree with its reference.
var ErrDiffers = errors.New("the engine differs from the reference")

// Verify is `trireme model verify`: it runs reference cases through the engine and compares prompt ids, patch grids,
// pixel values, the encoder's output, router logits, logits and every greedy id. It writes a line for each case, with
// the largest difference of each tensor, and a summary.
type Verify struct {
	Dir     string `arg:"" help:"Model folder in the format of Hugging Face." type:"path"`
	Golden  string `required:"" help:"Folder of reference outputs: cases.json with pictures and safetensors files, or golden.json." type:"path" placeholder:"DIR"`
	JSON    bool   `name:"json" help:"Write one JSON object instead of lines."`
	Backend string `help:"Backend to verify: host or reference (plain Go, slow)." default:"host"`
	Threads int    `help:"Worker threads; 0: one for each processor." default:"0"`
}

// Help is shown by `trireme model verify --help`.
func (Verify) Help() string {
	return `Compares prompt ids, patch grids, pixel values, the encoder's output, router logits, logits and every greedy id with what transformers
computed. The exit status is 1 if a case differs.

Examples:
  trireme model verify models/shapes-vl-moe --golden shared/testdata/golden/shapes-vl-moe
  trireme model verify models/shapes-vl-moe --golden shared/testdata/golden/shapes-vl-moe --json`
}

// Run verifies. It returns an ErrDiffers when a case fails, an ErrGolden when the reference cannot be read, or an
// error of opening the model.
func (c *Verify) Run(s Streams) (err error) {
	cases, err := readGolden(c.Golden)
	if err != nil {
		return err
	}
	f, err := hf.Open(c.Dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	f.Progress = LoadProgress(s.Err, LoadingWeights)
	compute, err := npu.Open(npu.Options{Backend: c.Backend, Threads: c.Threads})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, compute.Close()) }()
	r, err := newRunner(f, compute, cases)
	if err != nil {
		return err
	}

	step := func() {}
	if isTerminal(s.Err) && (c.JSON || !isTerminal(s.Out)) { // else the lines themselves show progress
		bar := newBar(s.Err, int64(len(cases)), "verifying", false)
		step = func() { _ = bar.Add(1) } // a bar that cannot be drawn is no reason to stop
	}
	report := Report{Model: f.Config.Name, Arch: f.Config.Arch, Kernels: compute.Digest(), Golden: c.Golden}
	start := time.Now()
	for i := range cases {
		rep := r.run(&cases[i])
		report.Cases = append(report.Cases, rep)
		if rep.OK {
			report.Passed++
		} else {
			report.Failed++
		}
		if !c.JSON {
			if _, err := fmt.Fprintln(s.Out, rep.line()); err != nil {
				return fmt.Errorf("writing: %w", err)
			}
		}
		step()
	}
	report.Seconds = time.Since(start).Seconds()
	if c.JSON {
		err = report.writeJSON(s.Out)
	} else {
		_, err = fmt.Fprintln(s.Out, report.summary())
	}
	if err != nil {
		return fmt.Errorf("writing: %w", err)
	}
	if report.Failed > 0 {
		return fmt.Errorf("%d of %d cases: %w", report.Failed, len(cases), ErrDiffers)
	}
	return nil
}

// LoadProgress shows the loading of weights, or what else is said, to a person at a terminal: bytes, bytes a second and the time left. What
// it shows goes when all are done. It is nil where w is no terminal.
func LoadProgress(w io.Writer, what string) func(done, total int64) {
	if !isTerminal(w) {
		return nil
	}
	var bar *progressbar.ProgressBar
	return func(done, total int64) {
		if bar == nil || bar.GetMax64() != total {
			bar = newBar(w, total, what, true)
		}
		if _ = bar.Set64(done); done >= total {
			bar = nil // another one begins anew
		}
	}
}

// LoadingWeights is what LoadProgress says of weights that a process waits for.
const LoadingWeights = "loading weights"

// newBar returns a progress bar that disappears when it is full.
func newBar(w io.Writer, total int64, what string, bytes bool) *progressbar.ProgressBar {
	return progressbar.NewOptions64(total,
		progressbar.OptionSetWriter(w),
		progressbar.OptionSetDescription(what),
		progressbar.OptionShowBytes(bytes),
		progressbar.OptionShowCount(),
		progressbar.OptionClearOnFinish(),
		progressbar.OptionThrottle(100*time.Millisecond),
	)
}
