package wire

import (
	"fmt"

	"github.com/vmihailenco/msgpack/v5"
)

// Tokens come 20 times a second with a run for each stream of a gateway, and nothing else comes half as often: they are decoded
// by hand, with a few allocations for a message instead of six for a token.

var _ msgpack.CustomDecoder = (*Tokens)(nil)

// The numbers of fields of the structs, which their arrays have.
const (
	tokensFields = 2
	runFields    = 12
)

// DecodeMsgpack implements msgpack.CustomDecoder.
func (t *Tokens) DecodeMsgpack(d *msgpack.Decoder) error {
	*t = Tokens{}
	if n, err := d.DecodeArrayLen(); err != nil || n <= 0 {
		return err
	} else if n != tokensFields {
		return fmt.Errorf("tokens of %d fields", n)
	}
	var err error
	if t.Instance, err = d.DecodeString(); err != nil {
		return err
	}
	n, err := d.DecodeArrayLen()
	if err != nil || n < 0 {
		return err
	}
	t.Items = make([]Run, n)
	r := reader{d: d, ids: make([]int32, 0, n), ends: make([]int, 0, n)}
	for i := range t.Items {
		if err := r.run(&t.Items[i]); err != nil {
			return err
		}
		r.ends = append(r.ends, len(r.text))
	}
	text, from := string(r.text), 0
	for i, end := range r.ends {
		t.Items[i].Request = text[from:end]
		from = end
	}
	return nil
}

// reader reads runs into memory that they share.
type reader struct {
	d    *msgpack.Decoder
	ids  []int32 // of all runs; its capacity is used up, then there is more elsewhere
	text []byte  // names of requests, one behind the other
	ends []int   // where each ends in text
}

// run reads a run but for its Request, whose text it appends.
func (r *reader) run(to *Run) error {
	d := r.d
	if n, err := d.DecodeArrayLen(); err != nil || n <= 0 {
		return err
	} else if n != runFields {
		return fmt.Errorf("a run of %d fields", n)
	}
	n, err := d.DecodeBytesLen()
	if err != nil {
		return err
	}
	if n > 0 {
		at := len(r.text)
		r.text = append(r.text, make([]byte, n)...)
		if err := d.ReadFull(r.text[at:]); err != nil {
			return err
		}
	}
	if err := r.ints(&to.Attempt, &to.Choice); err != nil {
		return err
	}
	if to.Generation, err = d.DecodeUint64(); err != nil {
		return err
	}
	if err := r.ints(&to.Index); err != nil {
		return err
	}
	if to.IDs, err = r.tokens(); err != nil {
		return err
	}
	if err := d.Decode(&to.Logprobs); err != nil {
		return err
	}
	finish, err := d.DecodeUint8()
	if err != nil {
		return err
	}
	to.Finish = Finish(finish)
	return r.ints(&to.Cached, &to.Computed, &to.Pictures, &to.Hits)
}

func (r *reader) ints(to ...*int) (err error) {
	for _, v := range to {
		if *v, err = r.d.DecodeInt(); err != nil {
			return err
		}
	}
	return nil
}

func (r *reader) tokens() ([]int32, error) {
	n, err := r.d.DecodeArrayLen()
	if err != nil || n < 0 {
		return nil, err
	}
	if cap(r.ids)-len(r.ids) < n {
		r.ids = make([]int32, 0, max(n, cap(r.ids)))
	}
	at := len(r.ids)
	r.ids = r.ids[:at+n]
	ids := r.ids[at : at+n : at+n]
	for i := range ids {
		if ids[i], err = r.d.DecodeInt32(); err != nil {
			return nil, err
		}
	}
	return ids, nil
}
