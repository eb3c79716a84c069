// Package record keeps what the scaler saw and decided in a file, one JSON object a line, and decides anew by such a file: the same policy
// makes the same decisions, byte for byte.
package record

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"trireme.dev/shared/sched/autoscale"
)

// Line is a line of a record: one of the following, and of a view with its decision both.
type Line struct {
	Began    *Head             `json:"began,omitempty"`  // what follows begins here
	Policy   *autoscale.Policy `json:"policy,omitempty"` // in force from here on
	View     *autoscale.View   `json:"view,omitempty"`
	Decision json.RawMessage   `json:"decision,omitempty"` // autoscale.Decision
}

// Head is the beginning of a record.
type Head struct {
	Scaler string    `json:"scaler"`
	Time   time.Time `json:"time"`
	// Continues says that an earlier file has what came before: what the scaler remembered of that is not here, and the first decisions of a
	// replay may be others.
	Continues bool `json:"continues,omitempty"`
}

// DefaultSize is the size at which a file is full.
const DefaultSize = 64 << 20

// Writer writes a record. When its file is full it is renamed to NAME.1, in the place of an earlier one, and a new one is begun. It is not
// safe for concurrent use.
type Writer struct {
	name   string
	most   int64
	scaler string
	now    func() time.Time
	file   *os.File
	size   int64
	policy autoscale.Policy
}

// Create opens a record, behind what is there already. Most is the size at which a file is full.
func Create(name string, most int64, scaler string, p autoscale.Policy, now func() time.Time) (*Writer, error) {
	w := &Writer{name: name, most: most, scaler: scaler, now: now, policy: p}
	if err := w.open(false); err != nil {
		return nil, err
	}
	return w, nil
}

func (w *Writer) open(continues bool) (err error) {
	if w.file, err = os.OpenFile(w.name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644); err != nil {
		return fmt.Errorf("opening the scaler's record: %w", err)
	}
	if w.size, err = w.file.Seek(0, io.SeekEnd); err != nil {
		return errors.Join(fmt.Errorf("opening the scaler's record: %w", err), w.Close())
	}
	if err := w.line(Line{Began: &Head{Scaler: w.scaler, Time: w.now(), Continues: continues}}); err != nil {
		return errors.Join(err, w.Close())
	}
	return w.line(Line{Policy: &w.policy})
}

// SetPolicy notes that another policy is in force.
func (w *Writer) SetPolicy(p autoscale.Policy) error {
	w.policy = p
	if w.file == nil { // it comes with the next file
		return nil
	}
	return w.line(Line{Policy: &p})
}

// Write notes a view and what was decided by it. After an error the file is begun anew by the next call.
func (w *Writer) Write(v *autoscale.View, d *autoscale.Decision) error {
	if w.file == nil {
		if err := w.open(true); err != nil {
			return err
		}
	}
	if w.size >= w.most {
		if err := w.Close(); err != nil {
			return err
		}
		if err := os.Rename(w.name, w.name+".1"); err != nil {
			return fmt.Errorf("beginning a new record: %w", err)
		}
		if err := w.open(true); err != nil {
			return err
		}
	}
	decision, err := json.Marshal(d)
	if err != nil {
		return fmt.Errorf("recording a decision: %w", err)
	}
	return w.line(Line{View: v, Decision: decision})
}

func (w *Writer) line(l Line) error {
	data, err := json.Marshal(&l)
	if err == nil {
		var n int
		n, err = w.file.Write(append(data, '\n'))
		w.size += int64(n)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("writing the scaler's record: %w", err), w.Close())
	}
	return nil
}

// Close closes the file.
func (w *Writer) Close() error {
	if w.file == nil {
		return nil
	}
	err := w.file.Close()
	w.file = nil
	if err != nil {
		return fmt.Errorf("closing the scaler's record: %w", err)
	}
	return nil
}

// Step is one decision of a replay.
type Step struct {
	Began    *Head // the first of this one
	View     *autoscale.View
	Recorded json.RawMessage // decision of the record
	Decision autoscale.Decision
	Text     []byte // of Decision, as Recorded is
}

// Same reports whether the decision is the recorded one, byte for byte.
func (s *Step) Same() bool { return bytes.Equal(s.Recorded, s.Text) }

// ErrRecord is wrapped by errors of what is no record.
var ErrRecord = errors.New("not a record of the scaler")

// Replay decides by the views of a record anew and calls f with each decision. With override it decides by that policy, else by those of
// the record. A last line that was cut off is left out.
func Replay(r io.Reader, override *autoscale.Policy, f func(*Step) error) error {
	in := bufio.NewReaderSize(r, 1<<20)
	var state *autoscale.State
	var began *Head
	for n := 1; ; n++ {
		data, err := in.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			if n == 1 {
				return fmt.Errorf("%w: it is empty", ErrRecord)
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading line %d: %w", n, err)
		}
		var l Line
		if err := json.Unmarshal(data, &l); err != nil {
			return fmt.Errorf("%w: line %d: %w", ErrRecord, n, err)
		}
		switch {
		case l.Began != nil:
			began, state = l.Began, nil
		case l.Policy != nil:
			p := *l.Policy
			if override != nil {
				p = *override
			}
			if state == nil {
				state = autoscale.New(p)
			} else {
				state.SetPolicy(p)
			}
		case l.View != nil && state != nil:
			s := Step{Began: began, View: l.View, Recorded: l.Decision, Decision: state.Decide(l.View)}
			if s.Text, err = json.Marshal(&s.Decision); err != nil {
				return fmt.Errorf("line %d: %w", n, err)
			}
			if err := f(&s); err != nil {
				return err
			}
			began = nil
		default:
			return fmt.Errorf("%w: line %d has neither a beginning, nor a policy, nor a view behind these", ErrRecord, n)
		}
	}
}
