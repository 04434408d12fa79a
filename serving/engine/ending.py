"""When a sequence has ended: the one rule that prefill and decode apply after each sampled token."""

from __future__ import annotations

from serving.core.request import FinishReason, Sequence


def finish_reason(sequence: Sequence, max_model_len: int | None = None) -> FinishReason | None:
    """After its newest token: a stop token wins over a length that is reached with it. None: the sequence goes on."""
    if sequence.token_ids[-1] in sequence.sampling.stop_token_ids:
        return FinishReason.STOP
    if sequence.num_new_tokens >= sequence.max_new_tokens:
        return FinishReason.LENGTH
    if max_model_len is not None and sequence.num_tokens >= max_model_len:
        return FinishReason.LENGTH
    return None
