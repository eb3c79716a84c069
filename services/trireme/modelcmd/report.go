package modelcmd

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// Report is what Verify writes with --json.
type Report struct {
	Model   string       `json:"model"`
	Arch    string       `json:"arch"`
	Kernels string       `json:"kernels"` // digest of the kernel set
	Golden  string       `json:"golden"`
	Cases   []CaseReport `json:"cases"`
	Passed  int          `json:"passed"`
	Failed  int          `json:"failed"`
	Seconds float64      `json:"seconds"` // all cases, without opening the model
}

// CaseReport is the outcome of one case.
type CaseReport struct {
	Name     string         `json:"name"`
	OK       bool           `json:"ok"`
	IDs      bool           `json:"ids_equal"` // all greedy ids are the reference's
	Tokens   int            `json:"tokens"`    // greedy ids of the reference
	Tensors  []TensorReport `json:"tensors"`
	Problems []string       `json:"problems,omitempty"` // whatever else is wrong, a sentence each
}

// fail notes a problem.
func (c *CaseReport) fail(format string, args ...any) {
	c.Problems = append(c.Problems, fmt.Sprintf(format, args...))
}

// settle sets OK.
func (c *CaseReport) settle() {
	c.OK = c.IDs && len(c.Problems) == 0
	for _, t := range c.Tensors {
		c.OK = c.OK && t.OK
	}
}

// line is the outcome in one line.
func (c *CaseReport) line() string {
	var b strings.Builder
	mark, ids := "ok  ", "equal"
	if !c.OK {
		mark = "FAIL"
	}
	if !c.IDs {
		ids = "DIFFER"
	}
	fmt.Fprintf(&b, "%s %s  ids %s (%d)", mark, c.Name, ids, c.Tokens)
	for _, t := range c.Tensors {
		switch {
		case t.Problem != "":
			fmt.Fprintf(&b, "  %s NOT COMPARED: %s", t.Name, t.Problem)
		case t.OK:
			fmt.Fprintf(&b, "  %s %.1e", t.Name, t.MaxDiff)
		default:
			fmt.Fprintf(&b, "  %s %.1e BEYOND %.1e", t.Name, t.MaxDiff, t.Tolerance)
		}
		if t.OffShare != nil {
			fmt.Fprintf(&b, " (%.2g%% of samples)", 100**t.OffShare)
		}
	}
	for _, p := range c.Problems {
		b.WriteString("  " + p)
	}
	return b.String()
}

// summary is the last line.
func (r *Report) summary() string {
	return fmt.Sprintf("%d of %d cases of %s agree with %s (kernels %s, %.1f s)",
		r.Passed, len(r.Cases), r.Model, r.Golden, r.Kernels, r.Seconds)
}

// writeJSON writes the report as one indented object.
func (r *Report) writeJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}
