"""A request as workers see it: what to sample, when to stop, how far it has come.

A job is one life of a request on one (prefill, decode) pair. A pre-emption or a dead worker ends the job, never the request: the router
starts another job whose `token_ids` are the prompt and everything already sent to the client. Random numbers are drawn by
(seed, position), so the text goes on as if nothing had happened.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec


class FinishReason(StrEnum):
    """Why a request ended. `stop` also covers end-of-sequence; stop strings are found by the router."""

    STOP = "stop"
    LENGTH = "length"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is drawn, in this order: logit bias, penalties, temperature, top-k, top-p, min-p.

    temperature 0 is greedy. top_k 0 and top_p 1 keep everything. `seed` is always set (the router draws one if the client gave none): the
    random numbers of the token at position p depend on (seed, p) alone. presence and frequency penalties count output tokens,
    repetition_penalty prompt and output. `logprobs` None: none; n >= 0: the chosen token's and the n best, of the distribution before
    temperature and truncation. `stop_token_ids` includes end-of-sequence unless the client asked to ignore it: workers know no other stop.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    logprobs: int | None = None
    stop_token_ids: list[int] = []


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural logarithms: of the chosen token, and of the best `len(top_ids)` tokens in falling order."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True, kw_only=True)
class Sequence:
    """One job inside a worker; owned and mutated by the scheduler alone.

    `token_ids` is prompt + emitted tokens + tokens sampled in this job. `num_computed` tokens have their latents in `page_ids`, `num_cached`
    of them had when it was admitted. `slot` is the row of the engine's static buffers while the job is admitted. `num_prompt_tokens` is the client's prompt, for penalties.
    """

    job_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    max_new_tokens: int
    deadline_s: float
    slot: int | None = None
    num_computed: int = 0
    num_cached: int = 0
    num_new_tokens: int = 0
    page_ids: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)
