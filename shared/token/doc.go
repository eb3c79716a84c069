// Package token turns text into token ids and back with the byte-level BPE that Qwen2, Qwen2.5, Qwen3 and Qwen3-VL
// ship as tokenizer.json. It gives the ids that Hugging Face tokenizers gives for the same file.
//
// It is not a general tokenizer library: a tokenizer.json that asks for anything that this package does not do (another
// model than BPE, another pre-tokenizer pattern, byte fallback, a post-processor that adds tokens) is refused by [Load]
// with [ErrUnsupported], because ids that are nearly right are worse than none. It knows nothing of chat templates or
// pictures.
//
// The way of a text: added tokens are cut out; what lies between is normalised (NFC), split into words by a hand-written
// scanner that follows the pre-tokenizer's regular expression, and each word's bytes are merged by rank.
package token
