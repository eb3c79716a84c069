// Package engine runs a model: the vision encoder (pixels to multimodal tokens) and the mixture-of-experts decoder
// (tokens to logits), in batches that may mix prompt chunks and single decode steps. It knows arithmetic and memory by
// interface only (shared/kernel); weights, KV blocks and multimodal planes are device slices that belong to the caller.
// Choosing the next token is in engine/sample.
//
// It is not a scheduler: which sequences make up a batch, where their KV blocks lie and when they are freed is decided
// elsewhere. It keeps no state of any sequence between two calls, so a sequence may go on in another process that maps
// the same blocks.
//
// The models are those of transformers' modeling_qwen3_vl_moe.py and modeling_qwen3_moe.py; comments name the
// functions there that a computation follows.
package engine

import "errors"

var (
	// ErrModel is returned by NewText and NewEncoder when weights do not have the shapes that the configuration says.
	ErrModel = errors.New("weights do not fit the model's configuration")
	// ErrBatch is returned by Text.Forward when a batch is malformed or over the limits. Nothing was computed then.
	ErrBatch = errors.New("malformed batch")
	// ErrGrid is returned by Encoder.Encode for a patch grid that the encoder cannot take or whose buffers do not fit,
	// and by Spans when placeholders and grids do not match.
	ErrGrid = errors.New("bad patch grid")
)
