// Package benchcmd holds the operator commands that measure: `trireme bench memory` this machine, with processes that it
// starts itself, `trireme bench control` what everything around the models costs, `trireme bench irp` what several encoders
// gain, and `trireme bench serve` a running server, as its clients see it. The structs are kong commands; the main
// program mounts them.
package benchcmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"trireme.dev/shared/conf"
	"trireme.dev/shared/hbm/hbmbench"
)

// Env is what a command runs in. Results go to Out, progress to Err.
type Env struct {
	Context  context.Context // ends on the signals that end the program
	In       io.Reader
	Out, Err io.Writer
}

// ErrUsage marks errors of flags that cannot be used; it has no text of its own and stands at the end.
var ErrUsage = errors.New("")

// Memory is `trireme bench memory`.
type Memory struct {
	JSON    bool          `name:"json" help:"Write one JSON object instead of a table."`
	Largest conf.Bytes    `help:"Largest object that is handed over and copied; it takes three times as much memory." default:"1GiB"`
	Time    time.Duration `help:"Time for each row, beside the preparations; three samples are taken at least." default:"300ms"`
}

// Help is shown by `trireme bench memory --help`.
func (Memory) Help() string {
	return `Starts an HMM and a second process that holds memory, both private to this command, and measures what memory costs here:
calls of the HMM, mapping, handing objects over by map and by copy, checksums, memory that is fresh, used before or made ready. Each row says which
other row of the same run its median is compared with: the unit is that ratio, since machines differ. Takes about half a
minute; use an idle machine.

Examples:
  trireme bench memory
  trireme bench memory --largest 64MiB --time 100ms      quick
  trireme bench memory --json | jq '.rows[] | {name, p50_ns, ratio, against}'`
}

// Run measures and prints.
func (c *Memory) Run(e Env) error {
	if c.Largest < hbmbench.Page || c.Largest > 1<<40 {
		return fmt.Errorf("--largest %v, must be %v to 1 TiB%w", c.Largest, conf.Bytes(hbmbench.Page), ErrUsage)
	}
	if c.Time < 0 || c.Time > time.Hour {
		return fmt.Errorf("--time %v, must be 0 to 1h%w", c.Time, ErrUsage)
	}
	r, err := c.measure(e)
	if err != nil {
		return err
	}
	return write(e.Out, c.JSON, r)
}

// Give is the hidden `trireme bench give`: the second process of Memory.
type Give struct {
	HMM string `name:"hmm" required:"" help:"Socket of the HMM." type:"path"`
}

// Run serves its parent until standard input ends.
func (c *Give) Run(e Env) error { return give(e.Context, c.HMM, e.In, e.Out) }

// progress tells a person on w what is being measured; nobody else.
func progress(w io.Writer, total int) (next func(what string), end func()) {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return func(string) {}, func() {}
	}
	bar := progressbar.NewOptions(total,
		progressbar.OptionSetWriter(w),
		progressbar.OptionShowCount(),
		progressbar.OptionClearOnFinish(),
	)
	return func(what string) { // a bar that cannot be drawn is no reason to stop
		bar.Describe(fmt.Sprintf("%-42s", what))
		_ = bar.Add(1)
	}, func() { _ = bar.Finish() }
}
