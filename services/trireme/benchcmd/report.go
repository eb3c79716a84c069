package benchcmd

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"strconv"
	"text/tabwriter"
	"time"

	"trireme.dev/shared/hbm/hbmbench"
	"trireme.dev/shared/obs"
)

// Report is what Memory writes with --json.
type Report struct {
	Version string   `json:"version"`
	CPUs    int      `json:"cpus"`
	Page    int64    `json:"page_bytes"` // of the extents that are mapped and attached
	Rows    []Row    `json:"rows"`
	LeftOut []string `json:"left_out,omitempty"` // what this machine has no room for
}

// Row is one measurement.
type Row struct {
	Name    string  `json:"name"`
	Extents int     `json:"extents,omitempty"` // at a time
	Calls   int     `json:"calls,omitempty"`   // at a time
	Bytes   int64   `json:"bytes,omitempty"`   // at a time
	Samples int     `json:"samples"`
	P50     int64   `json:"p50_ns"`
	P99     int64   `json:"p99_ns"`
	Each    float64 `json:"each_ns,omitempty"`     // P50 for one of the extents or calls, when they are many
	Rate    float64 `json:"bytes_per_s,omitempty"` // Bytes in P50; of rows that move or read them all
	Against string  `json:"against,omitempty"`     // name of the row that this one is compared with
	Ratio   float64 `json:"ratio,omitempty"`       // of the medians, each call's for calls: this one to that one
}

func newReport() *Report {
	return &Report{Version: obs.Version(), CPUs: runtime.NumCPU(), Page: hbmbench.Page}
}

// add appends the row of a case that was measured.
func (r *Report) add(w row, c hbmbench.Case, s hbmbench.Samples) error {
	made := Row{
		Name: w.name, Extents: c.Extents, Calls: c.Calls, Bytes: c.Bytes, Samples: len(s), Against: w.against,
		P50: int64(s.Quantile(0.5)), P99: int64(s.Quantile(0.99)),
	}
	if n := max(c.Extents, c.Calls); n > 1 {
		made.Each = float64(made.P50) / float64(n)
	}
	if c.Extents == 0 && c.Bytes > 0 && made.P50 > 0 {
		made.Rate = float64(c.Bytes) / time.Duration(made.P50).Seconds()
	}
	if w.against != "" {
		base, err := r.row(w.against)
		if err != nil {
			return err
		}
		made.Ratio = made.unit() / base.unit()
	}
	r.Rows = append(r.Rows, made)
	return nil
}

// unit is what ratios are made of.
func (r Row) unit() float64 {
	if r.Calls > 1 {
		return r.Each
	}
	return float64(r.P50)
}

// row returns the last row of a name.
func (r *Report) row(name string) (Row, error) {
	for i := len(r.Rows) - 1; i >= 0; i-- {
		if r.Rows[i].Name == name {
			return r.Rows[i], nil
		}
	}
	return Row{}, fmt.Errorf("BUG: no row %q to compare with", name)
}

func (r *Report) writeTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "MEASURED\tSAMPLES\tP50\tP99\tEACH\tGB/S\tRATIO OF P50")
	for _, m := range r.Rows {
		each, rate, ratio := "-", "-", "-"
		if m.Each > 0 {
			each = short(m.Each)
		}
		if m.Rate > 0 {
			rate = strconv.FormatFloat(m.Rate/1e9, 'f', 2, 64)
		}
		if m.Against != "" {
			ratio = strconv.FormatFloat(m.Ratio, 'g', 3, 64) + " x " + m.Against
		}
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\t%s\n", m.Name, m.Samples, short(float64(m.P50)), short(float64(m.P99)), each, rate, ratio)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, l := range r.LeftOut {
		if _, err := fmt.Fprintf(w, "left out: %s\n", l); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "extents of %d KiB; %d CPUs; EACH: of the extents or calls; GB: 10^9 bytes\n", r.Page>>10, r.CPUs)
	return err
}

// short writes nanoseconds with three digits.
func short(ns float64) string {
	for _, u := range []struct {
		name string
		ns   float64
	}{{"s", 1e9}, {"ms", 1e6}, {"us", 1e3}} {
		if ns >= u.ns {
			return strconv.FormatFloat(ns/u.ns, 'g', 3, 64) + " " + u.name
		}
	}
	return strconv.FormatFloat(ns, 'f', 0, 64) + " ns"
}

// tabler is a report that a person can read.
type tabler interface{ writeTable(io.Writer) error }

// write writes a report as a table or as JSON.
func write(w io.Writer, asJSON bool, r tabler) error {
	if !asJSON {
		return r.writeTable(w)
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(r)
}
