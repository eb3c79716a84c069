package token

import (
	"errors"
	"unicode/utf8"
)

// ErrNotUTF8 is returned by [Tokenizer.Encode] when the text is not valid UTF-8.
var ErrNotUTF8 = errors.New("text is not valid UTF-8")

// Tokenizer is a byte-level BPE tokenizer. It does not change after [Load] but for an internal cache, and is safe for
// concurrent use.
type Tokenizer struct {
	vocab   map[string]int32 // tokens of the model, written in the byte-level alphabet
	tokens  []entry          // by id; ids that name no token have nil bytes
	bytes   [256]int32       // id of the token of each single byte, -1 where there is none
	merges  map[pair]merge
	added   added // recognised before normalisation
	addedN  added // recognised in normalised text ("normalized": true)
	special map[string]int32
	nfc     bool
	split   splitter
	cache   wordCache
}

// entry is what is known of one id.
type entry struct {
	bytes   []byte
	special bool
}

// Encode returns the ids of text. Added tokens that stand in the text, special ones included, become their ids, as in a
// prompt made by a chat template. It returns [ErrNotUTF8] if text is not valid UTF-8.
func (t *Tokenizer) Encode(text string) ([]int, error) {
	if !utf8.ValidString(text) {
		return nil, ErrNotUTF8
	}
	ids := make([]int, 0, len(text)/3+4)
	t.added.each(text, func(piece string, id int32) {
		if id >= 0 {
			ids = append(ids, int(id))
			return
		}
		if t.nfc {
			piece = nfc(piece)
		}
		t.addedN.each(piece, func(piece string, id int32) {
			if id >= 0 {
				ids = append(ids, int(id))
				return
			}
			ids = t.encodeWords(ids, piece)
		})
	})
	return ids, nil
}

// EncodeOrdinary returns the ids of text with no added token recognised: "<|im_end|>" becomes the ids of its
// characters. It is for text that must not be able to speak for the template. Bytes that are not UTF-8 count as U+FFFD.
func (t *Tokenizer) EncodeOrdinary(text string) []int {
	if !utf8.ValidString(text) {
		text = string(appendText(nil, []byte(text)))
	}
	if t.nfc {
		text = nfc(text)
	}
	return t.encodeWords(make([]int, 0, len(text)/3+4), text)
}

// encodeWords appends the ids of normalised text that holds no added token.
func (t *Tokenizer) encodeWords(ids []int, text string) []int {
	for len(text) > 0 {
		n := t.split.next(text)
		ids = t.encodeWord(ids, text[:n])
		text = text[n:]
	}
	return ids
}

// Decode returns the text of ids. With skipSpecial, special tokens (but not other added tokens, such as "<think>") leave
// no text. Ids that name no token leave none either. Bytes that are not UTF-8 become U+FFFD, one for each maximal part
// of a character, as in Rust and Python.
func (t *Tokenizer) Decode(ids []int, skipSpecial bool) string {
	var raw []byte
	for _, id := range ids {
		if b, special, ok := t.Token(id); ok && !(special && skipSpecial) {
			raw = append(raw, b...)
		}
	}
	if utf8.Valid(raw) {
		return string(raw)
	}
	return string(appendText(nil, raw))
}

// Token returns the bytes of one token, which may be a part of a character, and whether it is a special token. ok is
// false if id names no token. The bytes belong to the tokenizer: the caller must not change them.
func (t *Tokenizer) Token(id int) (bytes []byte, special, ok bool) {
	if id < 0 || id >= len(t.tokens) || t.tokens[id].bytes == nil {
		return nil, false, false
	}
	e := &t.tokens[id]
	return e.bytes, e.special, true
}

// ID returns the id of a token by its name in tokenizer.json: an added token's content ("<|image_pad|>") or a vocabulary
// key, which is written in the byte-level alphabet ("Ġthe" for " the").
func (t *Tokenizer) ID(token string) (int, bool) {
	if id, ok := t.special[token]; ok {
		return int(id), true
	}
	id, ok := t.vocab[token]
	return int(id), ok
}

// Size returns one more than the largest id. A model's logits may be wider: the rest are padding that names no token.
func (t *Tokenizer) Size() int { return len(t.tokens) }

// Stream returns a decoder that takes ids one by one. See [Tokenizer.Decode] for skipSpecial.
func (t *Tokenizer) Stream(skipSpecial bool) *Stream {
	return &Stream{tokenizer: t, skipSpecial: skipSpecial}
}

// Stream decodes ids as they arrive. It is not safe for concurrent use. It holds at most three bytes, so a lost Stream
// is rebuilt by pushing the same ids again.
type Stream struct {
	tokenizer   *Tokenizer
	skipSpecial bool
	pending     []byte // the beginning of a character, at most three bytes
}

// Push returns the text that id completes: whole characters only, and U+FFFD only for bytes that no later token can make
// whole. All results of Push and then [Stream.Flush] in order are what [Tokenizer.Decode] gives for all ids.
func (s *Stream) Push(id int) string {
	b, special, ok := s.tokenizer.Token(id)
	if !ok || (special && s.skipSpecial) {
		return ""
	}
	if len(s.pending) == 0 && utf8.Valid(b) {
		return string(b)
	}
	raw := append(s.pending, b...)
	keep := partialTail(raw)
	text := string(appendText(nil, raw[:len(raw)-keep]))
	s.pending = append(s.pending[:0], raw[len(raw)-keep:]...)
	return text
}

// Flush ends the stream: it returns U+FFFD if the last character is incomplete, else "". The Stream is then as new.
func (s *Stream) Flush() string {
	if len(s.pending) == 0 {
		return ""
	}
	s.pending = s.pending[:0]
	return string(utf8.RuneError)
}

// partialTail returns how many bytes at the end of b are the beginning of a character that later bytes may complete.
func partialTail(b []byte) int {
	for n := 1; n < utf8.UTFMax && n <= len(b); n++ {
		tail := b[len(b)-n:]
		if utf8.RuneStart(tail[0]) {
			if !utf8.FullRune(tail) {
				return n
			}
			return 0
		}
	}
	return 0
}

// appendText appends raw to dst with U+FFFD in place of each maximal subpart that is not UTF-8 (Unicode 15, section 3.9,
// "U+FFFD Substitution of Maximal Subparts").
func appendText(dst, raw []byte) []byte {
	for len(raw) > 0 {
		r, n := utf8.DecodeRune(raw)
		if r == utf8.RuneError && n == 1 {
			dst = append(dst, string(utf8.RuneError)...)
			raw = raw[maximalSubpart(raw):]
			continue
		}
		dst = append(dst, raw[:n]...)
		raw = raw[n:]
	}
	return dst
}

// maximalSubpart returns the length of the longest beginning of b, at least one byte, that could have begun a character.
func maximalSubpart(b []byte) int {
	n := 1
	for n < len(b) && n < utf8.UTFMax && !utf8.FullRune(b[:n]) && !utf8.FullRune(b[:n+1]) {
		n++
	}
	return n
}

// byteLevel is the alphabet in which byte-level BPE writes bytes (GPT-2's bytes_to_unicode): printable Latin-1 bytes
// stand for themselves, the other 68 are U+0100 and up in order.
func byteLevel() (runes [256]rune, bytes map[rune]byte) {
	bytes = make(map[rune]byte, 256)
	next := rune(256)
	for b := range 256 {
		r := rune(b)
		if !(b >= '!' && b <= '~' || b >= 0xA1 && b <= 0xAC || b >= 0xAE) {
			r = next
			next++
		}
		runes[b] = r
		bytes[r] = byte(b)
	}
	return runes, bytes
}

// fromByteLevel returns the bytes that token stands for; ok is false if it uses a character outside the alphabet.
func fromByteLevel(token string, alphabet map[rune]byte) (raw []byte, ok bool) {
	raw = make([]byte, 0, len(token))
	for _, r := range token {
		b, known := alphabet[r]
		if !known {
			return nil, false
		}
		raw = append(raw, b)
	}
	return raw, true
}
