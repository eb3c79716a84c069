package benchcmd

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"trireme.dev/services/trireme/compare"
	"trireme.dev/services/trireme/load"
)

func (r *CompareReport) writeTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	for i, x := range r.Workloads {
		fmt.Fprintf(t, "%s A REQUEST: bounds TTFT %.0f ms, TPOT %.0f ms; encoding takes %.0f ms of an NPU, the prompt %.0f ms\n",
			strings.ToUpper(compare.Count(x.Pictures)), x.TTFTBound, x.TPOTBound, x.Encode, x.Prefill)
		fmt.Fprintln(t, "TOPOLOGY\tREQUESTS/S\tWITHIN BOUNDS %\tREPEATS\tTTFT P50 ms\tP99 ms\tTPOT ms")
		for _, c := range r.Rates[x.Pictures] {
			for _, rate := range r.Study.Rates(i) {
				m := r.At(c.Topology, i, rate)
				if len(m.Each) == 0 {
					continue
				}
				fmt.Fprintf(t, "%s\t%.2f\t%.0f\t%.0f-%.0f\t%.0f\t%.0f\t%.1f\n", c.Topology, rate, 100*m.Attainment, 100*m.Low(), 100*m.High(), m.TTFT, m.TTFT99, m.TPOT)
			}
		}
		fmt.Fprintf(t, "\nTOPOLOGY\t%.0f%% UP TO requests/s\tREPEATS\t\n", 100*load.Goal)
		for _, c := range r.Rates[x.Pictures] {
			more := ""
			if c.AtLeast {
				more = " or more"
			}
			fmt.Fprintf(t, "%s\t%.2f%s\t%.2f-%.2f\t\n", c.Topology, c.Mean(), more, c.Low(), c.High())
		}
		fmt.Fprintln(t)
	}
	fmt.Fprintln(t, "PICTURES\tENCODE / PROMPT\tBEST WITH SEPARATE ENCODE\tBEST OF THE OTHERS\tSEPARATE ENCODE")
	for _, f := range r.Findings {
		fmt.Fprintf(t, "%s\t%.2f\t%s\t%s\t%s\n", f.Workload.Pictures, f.Ratio, best(f.Separate), best(f.Joint), f.Verdict)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(w, "\nThe rule: %s\n", r.Rule)
	_, err := fmt.Fprintf(w, "NPUs paced as %s (%s); the host kept %.1f%% of the profile's rate or more; runs of %.0f s, %d repeats\n",
		r.Paced, r.Source, 100*r.Kept, r.Seconds, r.Repeats)
	if err == nil && r.Kept < leastKept {
		_, err = fmt.Fprintln(w, "This machine was too slow or too busy for the profile: figures are its own in part. Use fewer NPUs or lower rates.")
	}
	return err
}

// leastKept is the part of a profile's rate that has to be achieved for figures to be the profile's.
const leastKept = 0.97

func best(c *compare.Capacity) string {
	if c == nil {
		return "-"
	}
	return fmt.Sprintf("%s: %.2f (%.2f-%.2f)", c.Topology, c.Mean(), c.Low(), c.High())
}
