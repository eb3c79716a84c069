package load

import "time"

// Window is what clients felt in a part of a run.
type Window struct {
	From, To time.Time
	Pieces   int           // of answers that came
	Gap      time.Duration // longest between two pieces of one answer that reaches into the window, also where one end lies outside
	Closed   time.Duration // longest of those that end in the window
	Ended    int           // requests that ended in it, failed ones included
	Sent     int           // requests sent in it
	Good     int           // of these, that kept the bounds, whenever they ended
	Failed   int           // of these
}

// Seconds is the length of the window.
func (w *Window) Seconds() float64 { return w.To.Sub(w.From).Seconds() }

// Rate is pieces a second.
func (w *Window) Rate() float64 {
	if s := w.Seconds(); s > 0 {
		return float64(w.Pieces) / s
	}
	return 0
}

// Attainment is the share of the requests sent in the window, 0 to 1, that kept the bounds; 1 when none was.
func (w *Window) Attainment() float64 {
	if w.Sent == 0 {
		return 1
	}
	return float64(w.Good) / float64(w.Sent)
}

// Between looks at a part of the run. A stream whose next piece never came counts as a gap up to its end.
func (r *Report) Between(from, to time.Time, g Goodput) Window {
	w := Window{From: from, To: to}
	inside := func(t time.Time) bool { return !t.Before(from) && t.Before(to) }
	for i := range r.Samples {
		s := &r.Samples[i]
		ended := s.Sent.Add(s.E2EL)
		if inside(ended) {
			w.Ended++
		}
		if inside(s.Sent) {
			w.Sent++
			if g.Met(s) {
				w.Good++
			}
			if s.Err != nil {
				w.Failed++
			}
		}
		for k, at := range s.Pieces {
			if inside(at) {
				w.Pieces++
			}
			next := ended
			if k+1 < len(s.Pieces) {
				next = s.Pieces[k+1]
			} else if s.Err == nil {
				continue // nothing more was to come
			}
			if at.Before(to) && next.After(from) {
				w.Gap = max(w.Gap, next.Sub(at))
			}
			if inside(next) {
				w.Closed = max(w.Closed, next.Sub(at))
			}
		}
	}
	return w
}

// Rates is pieces a second in steps of a run from its beginning on, for a plot.
func (r *Report) Rates(step time.Duration) []float64 {
	rates := make([]float64, int(r.Duration/step)+1)
	for i := range r.Samples {
		for _, at := range r.Samples[i].Pieces {
			if k := int(at.Sub(r.Began) / step); k >= 0 && k < len(rates) {
				rates[k] += 1 / step.Seconds()
			}
		}
	}
	return rates
}

// Gaps is the longest gap between two pieces of one answer that ends in each step of a run, in seconds.
func (r *Report) Gaps(step time.Duration) []float64 {
	gaps := make([]float64, int(r.Duration/step)+1)
	for i := range r.Samples {
		pieces := r.Samples[i].Pieces
		for k := 1; k < len(pieces); k++ {
			if n := int(pieces[k].Sub(r.Began) / step); n >= 0 && n < len(gaps) {
				gaps[n] = max(gaps[n], pieces[k].Sub(pieces[k-1]).Seconds())
			}
		}
	}
	return gaps
}
