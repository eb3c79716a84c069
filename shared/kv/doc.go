// Package kv lays out a sequence's keys, values and token log in device memory: KV blocks over slabs, and the token
// log from which a successor goes on. It places and checks bytes; it asks nobody for memory (shared/hbm does) and
// computes nothing.
//
// # Token log, version 2
//
// Little-endian, in one object of kind log. It is the only state that a successor needs.
//
//	header   256 bytes   magic, version, sizes, request, choice, attempt, generation, committed; see the offsets below
//	slabs    64 bytes each   the slabs that hold the sequence's KV, as handles
//	blocks   16 bytes each   block i of the sequence: slab, block in the slab, flags, CRC-32C of a sealed block's content
//	records  24+8*top bytes each   token i of the answer: index, token, log probability, how many positions before it are
//	                               covered and the CRC-32C of their KV, alternatives, CRC-32C
//
// Order of writes in one step (DESIGN.md, step 4): KV of the last token, record, committed. A reader trusts records
// below committed whose CRC is right and KV of positions below prompt+committed-1; the position after that is
// computed again. The constant part of the header, each slab entry, block entry and record carry a CRC-32C of their own,
// and every block that is full must be sealed, so a torn or foreign page is found before it is used. What is in the open
// block is covered by the records: each has a checksum of the KV that it found there and no record before it did.
//
// A log has one writer for ever, or first prefill and then, when that has stopped writing, the first decoder. A successor of
// that copies it (Snapshot, Continue). Counters in the header move by compare-and-swap all the same: a second writer is
// found before it does harm.
package kv
