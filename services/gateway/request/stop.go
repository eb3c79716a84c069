package request

import "strings"

// stops finds stop strings in text that arrives in pieces. Where the pieces are cut makes no difference: the match that
// ends first wins, of several that end there the longest.
type stops struct {
	words []string
	held  string // end of the text so far that could be the beginning of a stop string, not yet given out
}

// match is a stop string that was found.
type match struct {
	word string
	text string // all text before it, as far as it was not given out yet
}

// push adds text. It returns the text that can be given out, or found when a stop string is complete.
func (s *stops) push(text string) (out string, found *match) {
	if len(s.words) == 0 {
		return text, nil
	}
	window := s.held + text
	end, start, word := -1, -1, ""
	for _, w := range s.words {
		if i := strings.Index(window, w); i >= 0 && (end < 0 || i+len(w) < end || i+len(w) == end && i < start) {
			end, start, word = i+len(w), i, w
		}
	}
	if end >= 0 {
		s.held = ""
		return "", &match{word: word, text: window[:start]}
	}
	keep := 0
	for _, w := range s.words {
		for n := min(len(w)-1, len(window)); n > keep; n-- {
			if strings.HasSuffix(window, w[:n]) {
				keep = n
			}
		}
	}
	s.held = window[len(window)-keep:]
	return window[:len(window)-keep], nil
}

// flush gives out what was held back: the answer ended without a stop string.
func (s *stops) flush() string {
	held := s.held
	s.held = ""
	return held
}
