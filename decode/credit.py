"""How many pages a job is promised before its latents come."""

from __future__ import annotations

from kvcache.layout import num_pages_for
from serving.core.errors import PagesExhausted
from serving.core.request import Sequence


def num_credit(sequence: Sequence, *, num_pages: int, max_model_len: int, expected_new_tokens: int) -> int:
    """Those of the text and of the growth that is likely. Raises PagesExhausted if a pool of `num_pages` could never hold the job."""
    num_tokens = min(sequence.num_tokens + sequence.max_new_tokens, max_model_len)
    num_needed = num_pages_for(max(num_tokens - 1, sequence.num_tokens))
    if num_needed > num_pages:
        raise PagesExhausted(
            f"{num_tokens} tokens need {num_needed} pages, the decode pool has {num_pages}; "
            "raise kv.decode_pages or lower model.max_model_len"
        )
    growth = min(sequence.max_new_tokens, expected_new_tokens)
    return min(num_pages_for(sequence.num_tokens + growth), num_pages)
