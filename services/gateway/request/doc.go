// Package request is one request's answer as the gateway sees it: a pure state machine that takes pieces of token
// streams from the stages and gives out text, in order, once, up to the end of each choice.
//
// It has no clock, no goroutine, no lock and no I/O: its owner feeds it and sends what it returns. It does not know how
// answers look on the wire (gateway/openai does) nor how tokens are made.
//
// The life of a choice: tokens are taken strictly in order of their index; each becomes text; text that could be the
// beginning of a stop string is held back; the choice ends with a stop string found here, or with the last token as the
// decoder says. A new attempt keeps everything and only says where to go on.
package request
