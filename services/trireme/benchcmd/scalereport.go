package benchcmd

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"text/tabwriter"

	"trireme.dev/services/trireme/scaling"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/wire"
)

func (r *ScaleReport) writeTable(w io.Writer) error {
	if n := len(r.Changes); n < r.Planned {
		fmt.Fprintf(w, "PARTIAL: %d of %d runs\n\n", n, r.Planned)
	}
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "WAY\tRUNS\tLATENCY s\tDOWNTIME s\tPEAK MEMORY\tBEFORE\tAFTER\tLONGEST GAP s\tWITHOUT s\tRATIO\tFAILED\tCHANGED\tOF")
	for i := range r.Ways {
		x := &r.Ways[i]
		fmt.Fprintf(t, "%s\t%d\t%.3f ±%.3f\t%.3f\t%v\t%v\t%v\t%.3f\t%.3f\t%.2f\t%d\t%d\t%d\n", r.label(x), x.Runs, x.Latency, x.Deviation, x.Downtime,
			conf.Bytes(x.Peak), conf.Bytes(x.Held), conf.Bytes(x.Settled), x.During.Gap, x.Before.Gap, x.Gaps, x.Failed, x.Changed, x.Sent)
	}
	fmt.Fprintln(t, "\nWAY\tTOKENS/s BEFORE\tDURING\tAFTER\tREQUESTS/s BEFORE\tDURING\tAFTER\tIN TIME BEFORE\tDURING\tAFTER\tWINDOW s")
	for i := range r.Ways {
		x := &r.Ways[i]
		b, d, a := &x.Before, &x.During, &x.After
		fmt.Fprintf(t, "%s\t%.1f\t%.1f\t%.1f\t%.2f\t%.2f\t%.2f\t%.0f%%\t%.0f%%\t%.0f%%\t%.1f\n", r.label(x), b.Rate, d.Rate, a.Rate,
			b.Requests, d.Requests, a.Requests, 100*b.Attainment, 100*d.Attainment, 100*a.Attainment, d.Seconds)
	}
	if curve := r.curve(); len(curve) > 1 {
		fmt.Fprintln(t, "\nCOPY RATE\tLATENCY s\tALLOWED s\tGAP RATIO\tTHROUGHPUT DURING")
		for _, x := range curve {
			fmt.Fprintf(t, "%v/s\t%.3f\t%.3f\t%.2f\t%.1f%%\n", conf.Bytes(x.CopyRate), x.Latency, x.Allowed, x.Gaps, 100*x.Throughput)
		}
	}
	if len(r.Bars) > 0 {
		fmt.Fprintln(t, "\nBAR\tMEASURED\tBOUND\tRUNS\t")
		for _, b := range r.Bars {
			sign, verdict := "at most", "missed"
			if b.Least {
				sign = "at least"
			}
			if b.Kept {
				verdict = "kept"
			}
			fmt.Fprintf(t, "%s\t%.4g %s\t%s %.4g\t%d\t%s\n", b.Name, b.Measured, b.Unit, sign, b.Bound, b.Runs, verdict)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	if slices.ContainsFunc(r.Bars, func(b scaling.Bar) bool { return !b.Kept }) {
		fmt.Fprintln(w, "bars are for the default size on a machine with nothing else to do: of a smaller model, what is the same for every size counts for more")
	}
	if !r.Compared {
		fmt.Fprintln(w, "answers were not compared with those of an instance that does not change, so that none is known to be changed")
	}
	if r.Best > 0 && r.Change != wire.ChangeScale {
		fmt.Fprintf(w, "elastic is %.2f times as fast as the best of the other ways, for which there is no bar here\n", r.Best)
	}
	if r.Standby > 0 {
		fmt.Fprintf(w, "elastic is %.2f times as fast as a standby replica of our own, which is no bar\n", r.Standby)
	}
	for i := range r.Ways {
		x := &r.Ways[i]
		if len(x.Parts) == 0 {
			continue
		}
		fmt.Fprintf(w, "%s:", r.label(x))
		for _, name := range slices.Sorted(maps.Keys(x.Parts)) {
			fmt.Fprintf(w, " %s %.4g", name, x.Parts[name])
		}
		fmt.Fprintln(w)
	}
	paced := "NPUs as fast as the host"
	if r.Paced != "" {
		paced = "NPUs paced as " + r.Paced
	}
	change := "experts placed anew on"
	if from, to := r.Changes[0].From, r.Changes[0].To; from != to {
		change = fmt.Sprintf("%d NPUs to", from)
		if r.Change == wire.ChangeRole {
			change = fmt.Sprintf("a decoder of %d NPUs, beside a prefill instance of %d, to", from, prefillNPUs)
		}
	}
	_, err := fmt.Fprintf(w, "%s %d NPUs; %s, domains %s; experts of %v; copies at %v/s at most, disk at %v/s; %.2f requests a second, %s; in time: TTFT %.0f ms, TPOT %.0f ms\n",
		change, r.Changes[0].To, paced, r.Domains, conf.Bytes(r.Bytes), conf.Bytes(r.CopyRate), conf.Bytes(r.DiskRate), r.Rate, r.Arrivals, r.TTFT, r.TPOT)
	return err
}

// save writes the report to a file, which has the one before or this one at any time.
func (r *ScaleReport) save(file string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(file+".new", data, 0o644); err != nil {
		return fmt.Errorf("saving the report: %w", err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		return fmt.Errorf("saving the report: %w", err)
	}
	return nil
}

// label names a way, with its copy rate where there are several.
func (r *ScaleReport) label(x *scaling.Summary) string {
	if len(r.curve()) > 1 && x.Strategy == scaling.Elastic {
		return fmt.Sprintf("%s, %v/s", x.Strategy, conf.Bytes(x.CopyRate))
	}
	return x.Strategy
}

// curve is elastic at each copy rate, slowest first.
func (r *ScaleReport) curve() (curve []scaling.Summary) {
	for _, x := range r.Ways {
		if x.Strategy == scaling.Elastic {
			curve = append(curve, x)
		}
	}
	slices.SortFunc(curve, func(a, b scaling.Summary) int { return cmp.Compare(a.CopyRate, b.CopyRate) })
	return curve
}
