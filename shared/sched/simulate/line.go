package simulate

import (
	"time"

	"trireme.dev/shared/sched"
	"trireme.dev/shared/sched/autoscale"
)

// request is one that has come.
type request struct {
	Request
	index  int
	item   sched.Item // in the line, then among an instance's prompts
	in     bool       // it was let in
	begun  bool       // its place is given back: it has its first token
	missed bool       // it is known to miss its targets

	encoded int           // pictures that are
	encode  time.Duration // when it was let in
	prompt  time.Duration // when its pictures were there
	pos     int           // prompt tokens that are computed
	chunk   int           // of the step that is being computed
	tokens  int           // of the answer that there are
	first   time.Duration // when the first token came to the client; -1: not yet
	on      *instance     // where it is in work, for prefill or decode
	npu     *npu
	takes   bool // it has part in the step that is being computed
	taken   int  // how often a decoder has taken it, or handed it over
}

// kv is the tokens of KV memory that it may come to need.
func (r *request) kv() int { return r.Prompt + r.Output }

// line is the gateway's: who may start (services/gateway/admission).
type line struct {
	f     *Fleet
	queue *sched.Queue
	let   sched.Rate
	open  int
	ahead int // open requests without their first token
	kv    int // tokens that open requests may come to need

	service sched.Service // as measured lately
}

func newLine(f *Fleet) line {
	return line{f: f, queue: sched.NewQueue(sched.Order{Policy: f.cfg.Order, Patience: patience})}
}

// push lets a request in, or has it wait.
func (l *line) push(r *request) {
	if l.queue.Len() == 0 && l.fits(r) {
		l.take(r)
		return
	}
	now := l.f.now
	if l.queue.Len() == 0 {
		l.let.Start(now)
	}
	r.item = sched.Item{Owner: r, Tokens: int64(r.kv()), Arrived: r.Arrive, Due: sched.Never}
	if b := l.f.cfg.Aims.Split(l.service); b.Start != sched.Never {
		r.item.Due = r.Arrive + b.Start
	}
	l.queue.Push(&r.item)
	if l.f.cfg.Order == sched.SLO && r.item.Due != sched.Never {
		wait := time.Duration(0)
		if r.item.Due >= now && l.let.Known() {
			wait, _ = l.let.Time(now, l.queue.Before(&r.item)+r.item.Tokens)
		}
		if now+wait > r.item.Due {
			l.queue.Demote(&r.item)
		}
	}
	if w := l.f.cfg.Wait; w > 0 {
		l.f.at(now+w, func() {
			if !r.in && l.queue.Remove(&r.item) {
				l.quiet()
				l.f.signals.refused()
				l.f.ended(r, true)
				l.grant()
			}
		})
	}
	l.grant()
}

func (l *line) quiet() {
	if l.queue.Len() == 0 {
		l.let.Stop(l.f.now)
	}
}

// fits reports whether a request may start. With nothing open anything may.
func (l *line) fits(r *request) bool {
	if l.open == 0 {
		return true
	}
	places := 0
	room, bounded := 0, false
	for _, i := range l.f.instances {
		if !i.ready || i.width() == 0 {
			continue
		}
		if i.has(autoscale.Encode) || i.has(autoscale.Prefill) {
			places += i.width() * l.f.cfg.Ahead
		}
		if i.has(autoscale.Decode) && i.kv > 0 {
			room += i.width() * i.kv
			bounded = true
		}
	}
	return (l.ahead == 0 || l.ahead < max(places, l.f.cfg.Ahead)) && (!bounded || l.kv+r.kv() <= room)
}

func (l *line) take(r *request) {
	r.in = true
	l.open++
	l.ahead++
	l.kv += r.kv()
	r.encode = l.f.now
	f := l.f
	if r.Pictures == 0 {
		f.after(f.cfg.Hop, func() { f.prompted(r) })
		return
	}
	f.after(f.cfg.Hop, func() {
		for range r.Pictures {
			f.queues[autoscale.Encode] = append(f.queues[autoscale.Encode], r)
		}
		f.dispatch(autoscale.Encode)
	})
}

// started says that a request has its first token: others may come to theirs.
func (l *line) started(r *request) {
	r.begun = true
	l.ahead--
	measured := func(to *time.Duration, took time.Duration) { *to += (took - *to) / 8 }
	if r.Pictures > 0 {
		measured(&l.service.Encode, r.prompt-r.encode)
	}
	measured(&l.service.Prefill, l.f.now-r.prompt)
	l.grant()
}

// release says that a request has ended.
func (l *line) release(r *request) {
	l.open--
	l.kv -= r.kv()
	l.grant()
}

// grant lets in who waits, in order.
func (l *line) grant() {
	if l.queue.Len() == 0 {
		return
	}
	now := l.f.now
	for _, it := range l.queue.Overdue(now) {
		l.queue.Demote(it)
	}
	for it := l.queue.Next(); it != nil; it = l.queue.Next() {
		r := it.Owner.(*request)
		if !l.fits(r) {
			return
		}
		l.queue.Take()
		l.let.Done(now, max(1, it.Tokens))
		l.quiet()
		l.take(r)
	}
}
