"""What one step of the model is given: ids, positions, rows, and where each sequence's cached latents lie.

A token's row is `page_ids[p // 64] * 64 + p % 64` for position p. Rows of the pool's last page are scratch: what must
not be stored is written there. Plain data; who fills it (the engine) owns the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class SeqChunk:
    """One sequence's tokens `[offset, offset + num_tokens)` of a prefill batch.

    `context_len` is the position of the first of them: cached rows `[0, context_len)` and the chunk itself are attended.
    `page_ids`: int32 or int64, at least `ceil(context_len / 64)` pages; entries beyond are not read.
    """

    offset: int
    num_tokens: int
    context_len: int
    page_ids: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefillContext:
    """What is cached before N chunks, one after the other, where the host does not say how much: no shape depends on it.

    `slots_C`: int64, slots of `serving.kernels.rows`. `starts`: int32 [N + 1], where those of each chunk begin and the last one's
    end; rows from there on are read, may hold anything, and are not attended.
    """

    slots_C: Tensor
    starts: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefillBatch:
    """Chunks of several sequences, one after the other. int64 tensors [T].

    `starts`: int32 [N + 1], where each chunk begins and the last one ends; some may be empty. What is cached before them is said
    by `seqs`, of each chunk, or by `context`; where `seqs` is empty and `context` None nothing is.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    row_ids_T: Tensor
    starts: Tensor
    seqs: tuple[SeqChunk, ...]
    context: PrefillContext | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeBatch:
    """The next token, or the T <= 4 next ones, of each of B sequences. `page_table_BP` int32 or int64 [B, P].

    int64 tensors, lengths int32 too: `context_lens_B` [B] counts a sequence's last token here; the others are [B], and with T tokens
    [B * T], those of a sequence side by side. Entries of the page table past `ceil(context_len / 64)` may hold anything.
    A padding row points at scratch (`row_ids_B` and its first page) and has context length T.
    """

    token_ids_B: Tensor
    positions_B: Tensor
    row_ids_B: Tensor
    page_table_BP: Tensor
    context_lens_B: Tensor
    num_tokens: int = 1
