// Package modelcmd holds the operator commands about model folders: `trireme model verify` compares what the engine
// computes with reference outputs, `trireme model tokenize` shows what the tokenizer does. They run in one process and
// need no running service. The structs are kong commands; the main program mounts them.
package modelcmd

import (
	"io"
	"os"

	"golang.org/x/term"
)

// Streams are a command's standard streams. Results go to Out, progress to Err.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// isTerminal says whether a person reads what is written to w.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
