package request

import (
	"slices"

	"trireme.dev/shared/wire"
)

// Reason says why a choice ended, as clients see it.
type Reason uint8

// The reasons. ReasonNone while a choice goes on.
const (
	ReasonNone   Reason = iota
	ReasonStop          // a stop id was sampled or a stop string was found
	ReasonLength        // max_tokens or the context was reached
)

// String is finish_reason of the OpenAI API, "" for ReasonNone.
func (r Reason) String() string {
	switch r {
	case ReasonStop:
		return "stop"
	case ReasonLength:
		return "length"
	}
	return ""
}

// TextStream turns the ids of one choice into text as they come (shared/token's Stream does).
type TextStream interface {
	Push(id int) string // the text that id completes, whole characters only
	Flush() string      // what an incomplete character at the end becomes
}

// Config is what a request asked for, as far as its answer is concerned.
type Config struct {
	Choices     int
	Stop        []string // strings that end a choice; none is empty
	IncludeStop bool     // the stop string, or the text of the stop id, stays in the answer
	MinTokens   int      // text of the first so many tokens is not searched for stop strings

	// Apart reports whether two instances are of different nodes: each node's HMM has generations of its own, that say nothing
	// beside another's. nil: there is one node.
	Apart func(instance, other string) bool
}

// Token is one token of a piece.
type Token struct {
	ID      int32
	Logprob *wire.Logprob // nil unless asked for
}

// Piece is what a client gets next of one choice.
type Piece struct {
	Choice int
	Text   string
	Tokens []Token // taken since the last piece; valid until the next call of Take
	Reason Reason  // set with the last piece of a choice
	Word   string  // the stop string that ended the choice, "" for other ends
	StopID int32   // the id that ended the choice, -1 for other ends
}

// Answer is the state of one request's answer. Its methods must not be called at the same time.
type Answer struct {
	cfg     Config
	attempt int
	choices []choice
	open    int // choices that have not ended

	cached, computed int // of the newest attempt's prompt
	hits             int // of its pictures: not encoded for it

	piece Piece // the one that is emitted
}

type choice struct {
	text  TextStream
	stops stops
	ids   []int32 // every token in order: the client's, and those behind text held back
	over  bool

	owed bool // the decoder ended the choice and has not asked yet whether the end has arrived

	// Of the attempt that runs now.
	generation uint64 // newest claim generation of a decoder seen
	seen       int    // highest index after a token that was announced: above len(ids) there is a gap
	sender     string // instance that sent last
	finish     wire.Finish
	finishAt   int // tokens that the choice has in all; counts if finish is set
	tokens     []Token
}

// New makes the state of a request whose first attempt is about to begin. stream is called once for each choice.
func New(cfg Config, stream func() TextStream) *Answer {
	a := &Answer{cfg: cfg, attempt: 1, choices: make([]choice, cfg.Choices), open: cfg.Choices}
	for i := range a.choices {
		a.choices[i].text = stream()
		a.choices[i].stops.words = cfg.Stop
	}
	return a
}

// Attempt is the number of the attempt whose messages count, from 1.
func (a *Answer) Attempt() int { return a.attempt }

// Done reports whether every choice has ended.
func (a *Answer) Done() bool { return a.open == 0 }

// Over reports whether one choice has ended.
func (a *Answer) Over(choice int) bool { return a.choices[choice].over }

// Generated is the number of tokens of all choices, up to the ends that the client sees.
func (a *Answer) Generated() int {
	n := 0
	for i := range a.choices {
		n += len(a.choices[i].ids)
	}
	return n
}

// Tokens is the number of tokens of one choice.
func (a *Answer) Tokens(choice int) int { return len(a.choices[choice].ids) }

// Prompt returns how many prompt tokens the newest attempt took from the prefix cache and how many it computed.
func (a *Answer) Prompt() (cached, computed int) { return a.cached, a.computed }

// Hits returns how many pictures were not encoded for the newest attempt, as they had been for another request.
func (a *Answer) Hits() int { return a.hits }

// Restart begins the next attempt: whatever older ones still send is dropped from now on. It returns the tokens of each
// choice so far, for the new attempt to go on from; they are the caller's.
func (a *Answer) Restart() [][]int32 {
	a.attempt++
	resume := make([][]int32, len(a.choices))
	for i := range a.choices {
		c := &a.choices[i]
		c.generation, c.seen, c.sender, c.finish = 0, len(c.ids), "", wire.FinishNone
		resume[i] = slices.Clone(c.ids)
	}
	return resume
}

// Take takes a run of tokens that instance sent, and calls emit with what the client gets for it, if anything, valid during that call. Runs of
// other attempts, tokens that are already here, runs of a writer that lost its claim and runs beyond the next index
// leave the answer as it is; the last make a gap (see Gap).
//
// A run without a generation is a prefill's first token. It needs no fence: it is taken at most once, by its index.
func (a *Answer) Take(instance string, run *wire.Run, emit func(*Piece)) {
	if run.Attempt != a.attempt || run.Choice < 0 || run.Choice >= len(a.choices) || run.Index < 0 {
		return
	}
	c := &a.choices[run.Choice]
	if c.over {
		return
	}
	if run.Generation != 0 {
		if a.older(c, instance, run.Generation) {
			return
		}
		c.generation = run.Generation
	}
	c.sender = instance
	next := len(c.ids)
	end := run.Index + len(run.IDs)
	c.seen = max(c.seen, end)
	if run.Finish != wire.FinishNone {
		c.finish, c.finishAt = run.Finish, end
	}
	if run.Index > next || end < next || end == next && run.Finish == wire.FinishNone {
		return
	}
	if run.Cached > 0 || run.Computed > 0 {
		a.cached, a.computed = max(0, run.Cached), max(0, run.Computed)
		a.hits = max(0, run.Hits)
	}
	a.append(run, next-run.Index, emit)
}

// older reports whether a decoder's claim is older than the one of whoever sent last.
func (a *Answer) older(c *choice, instance string, generation uint64) bool {
	return generation < c.generation && (a.cfg.Apart == nil || !a.cfg.Apart(instance, c.sender))
}

// append takes the tokens of run from number skip on.
func (a *Answer) append(run *wire.Run, skip int, emit func(*Piece)) {
	c := &a.choices[run.Choice]
	p := &a.piece
	*p = Piece{Choice: run.Choice, StopID: -1}
	c.tokens = c.tokens[:0]
	for i := skip; i < len(run.IDs) && p.Reason == ReasonNone; i++ {
		a.push(c, p, run.IDs[i])
		if i < len(run.Logprobs) {
			c.tokens[len(c.tokens)-1].Logprob = &run.Logprobs[i]
		}
	}
	if p.Reason == ReasonNone && c.finish != wire.FinishNone && len(c.ids) >= c.finishAt {
		a.finish(c, p)
	}
	p.Tokens = c.tokens
	if p.Reason != ReasonNone {
		c.over = true
		a.open--
	}
	if p.Text != "" || p.Reason != ReasonNone || len(run.Logprobs) > 0 {
		emit(p)
	}
}

// push adds one token to a choice and to the piece. The id that ends the choice leaves no text unless the client asked
// for it, as in vLLM.
func (a *Answer) push(c *choice, p *Piece, id int32) {
	c.ids = append(c.ids, id)
	c.tokens = append(c.tokens, Token{ID: id})
	stopID := c.finish == wire.FinishStop && len(c.ids) == c.finishAt
	if !stopID || a.cfg.IncludeStop {
		a.addText(c, p, c.text.Push(int(id)))
	}
}

// addText sends text through the stop strings.
func (a *Answer) addText(c *choice, p *Piece, text string) {
	if text == "" {
		return
	}
	if len(c.ids) <= a.cfg.MinTokens {
		p.Text += text
		return
	}
	out, found := c.stops.push(text)
	p.Text += out
	if found == nil {
		return
	}
	p.Text += found.text
	if a.cfg.IncludeStop {
		p.Text += found.word
	}
	p.Reason, p.Word = ReasonStop, found.word
}

// finish ends a choice that the decoder has ended.
func (a *Answer) finish(c *choice, p *Piece) {
	a.addText(c, p, c.text.Flush())
	if p.Reason != ReasonNone {
		return // the replaced character completed a stop string
	}
	c.owed = true
	p.Text += c.stops.flush()
	p.Reason = ReasonLength
	if c.finish == wire.FinishStop {
		p.Reason = ReasonStop
		if n := len(c.ids); n > 0 {
			p.StopID = c.ids[n-1]
		}
	}
}

// Gap returns the first missing index of a choice and the instance to ask for it; ok is false when nothing that was
// announced is missing.
func (a *Answer) Gap(choice int) (from int, instance string, ok bool) {
	c := &a.choices[choice]
	if c.over || c.seen <= len(c.ids) || c.sender == "" {
		return 0, "", false
	}
	return len(c.ids), c.sender, true
}

// Confirm answers a decoder's question. An end that the decoder reports and that got lost on its way counts from here
// on, once every token before it is here; emit is called as by Take.
func (a *Answer) Confirm(m *wire.Confirm, emit func(*Piece)) wire.Confirmed {
	if m.Attempt != a.attempt || m.Choice < 0 || m.Choice >= len(a.choices) {
		return wire.Confirmed{Over: true}
	}
	c := &a.choices[m.Choice]
	if m.Finish != wire.FinishNone && m.Next == len(c.ids) && !c.over && !a.older(c, m.Instance, m.Generation) {
		c.finish, c.finishAt = m.Finish, m.Next
		a.append(&wire.Run{Choice: m.Choice, Index: m.Next}, 0, emit)
	}
	if m.Finish != wire.FinishNone && c.over {
		c.owed = false
	}
	return wire.Confirmed{Next: len(c.ids), Over: c.over}
}

// Owed reports whether a decoder that ended a choice still has to be told that its end has arrived. Choices that ended
// here, by a stop string, owe nothing: their decoders are told to stop.
func (a *Answer) Owed() bool {
	for i := range a.choices {
		if a.choices[i].owed {
			return true
		}
	}
	return false
}
