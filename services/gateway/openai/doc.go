// Package openai is the HTTP API's wire: requests of POST /v1/chat/completions and /v1/completions as OpenAI and vLLM
// shape them, answers, stream chunks and error objects. Decoding a request checks everything that can be checked
// without a model, and names the parameter at fault.
//
// It serves no HTTP, counts no tokens and fetches no pictures: services/gateway does, with this package's values.
//
// Facts about the shapes: OpenAI's API reference as in github.com/openai/openai-go/v3, vLLM's extra parameters as in its
// documentation of the OpenAI-compatible server (top_k, min_p, repetition_penalty, min_tokens, ignore_eos,
// stop_token_ids, include_stop_str_in_output, skip_special_tokens, chat_template_kwargs; stop_reason in answers).
// Members that nobody knows are ignored, as those servers do; members that would change the answer and are not
// supported are refused.
package openai
