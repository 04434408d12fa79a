"""From a job message to a sequence: what a router sends is checked before a scheduler or the sampler sees it.

An authentic router can still be of another version, or wrong: nonsense is a PeerError and ends that job, never the
worker. What a client may ask for was decided by the router; here only what could break a step is refused.
"""

from __future__ import annotations

import math

from serving.core.errors import PeerError
from serving.core.messages import DecodeJob, PrefillJob
from serving.core.request import SamplingParams, Sequence

MAX_LOGPROBS = 64


def sequence_of(job: PrefillJob | DecodeJob, *, vocab_size: int, now_s: float) -> Sequence:
    """The job as a fresh sequence; its budget starts now. Raises PeerError."""
    _require(len(job.token_ids) > 0, "it has no tokens")
    _require(min(job.token_ids) >= 0 and max(job.token_ids) < vocab_size, f"token ids must lie in [0, {vocab_size})")
    _require(1 <= job.num_prompt_tokens <= len(job.token_ids), f"num_prompt_tokens is {job.num_prompt_tokens}")
    _require(job.max_new_tokens >= 1, f"max_new_tokens is {job.max_new_tokens}")
    _require(math.isfinite(job.budget_s), f"budget_s is {job.budget_s}")
    _check_sampling(job.sampling, vocab_size)
    return Sequence(
        job_id=job.job_id,
        token_ids=list(job.token_ids),
        num_prompt_tokens=job.num_prompt_tokens,
        sampling=job.sampling,
        max_new_tokens=job.max_new_tokens,
        deadline_s=now_s + job.budget_s,
    )


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    values = (
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty,
        *sampling.logit_bias.values(),
    )
    _require(all(math.isfinite(value) for value in values), "a sampling parameter is not finite")
    _require(sampling.temperature >= 0 and sampling.top_k >= 0, "temperature and top_k must be at least 0")
    _require(0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1, "top_p must lie in (0, 1], min_p in [0, 1]")
    _require(sampling.repetition_penalty > 0, "repetition_penalty must be positive")
    _require(all(0 <= token_id < vocab_size for token_id in sampling.logit_bias), "logit_bias names no such token")
    _require(0 <= sampling.seed < 1 << 64, "seed must be a number of 64 bits")
    _require(sampling.logprobs is None or 0 <= sampling.logprobs <= MAX_LOGPROBS, "logprobs is out of range")


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise PeerError(f"the job makes no sense: {reason}; do router and worker serve the same model?")
