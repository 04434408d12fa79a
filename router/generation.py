"""One text that a client asked for: what it starts from, what has been emitted, how it ended.

    waiting --placed--> running --stop, length, stop string--> finished
       ^                   |  \\--no attempt or no room left--> failed(error)
       +---resumed---------+        (a client that goes away, in any state --> cancelled)

A life is one job on one (prefill, decode) pair. The prefill worker's tokens come first in a life; what decode says before is held.
Must not know sockets, workers' load or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from router.view import Worker
from serving.core.errors import BatonError
from serving.core.messages import JobTokens
from serving.core.request import FinishReason, SamplingParams, TokenLogprobs


class Outcome(StrEnum):
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True)
class Slo:
    """Seconds promised to this request."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be generated. `prompt_ids` is the client's prompt; `max_new_tokens` >= 1."""

    prompt_ids: list[int]
    sampling: SamplingParams
    max_new_tokens: int
    slo: Slo


@dataclass(eq=False, kw_only=True)
class Life:
    """One job. `decode` is None when one worker makes all its tokens. `held` is what decode sent before prefill's first token was here;
    `has_decode` says that decode has sent any, so that it holds the latents."""

    job_id: str
    prefill: Worker
    decode: Worker | None
    started_s: float
    has_first: bool = False
    has_decode: bool = False
    held: list[JobTokens] = field(default_factory=list)

    @property
    def workers(self) -> tuple[Worker, ...]:
        return (self.prefill,) if self.decode is None else (self.prefill, self.decode)


@dataclass(eq=False, kw_only=True)
class Generation:
    """`token_ids` and `logprobs` grow while it runs; `notify` is called after every change. Times are of one monotonic clock.

    `num_cached_tokens` of the prompt did not have to be computed before the first token.
    """

    order: Order
    notify: Callable[[], None]
    arrived_s: float
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    life: Life | None = None
    num_lives: int = 0
    num_failures: int = 0
    num_preemptions: int = 0
    avoid: frozenset[str] = frozenset()
    outcome: Outcome | None = None
    finish: FinishReason | None = None
    error: BatonError | None = None
    num_cached_tokens: int = 0
    prefill_id: str = ""
    decode_id: str = ""
    placed_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def max_new_tokens(self) -> int:
        """What is left of them."""
        return self.order.max_new_tokens - len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.order.prompt_ids) + len(self.token_ids)

    def all_ids(self) -> list[int]:
        return [*self.order.prompt_ids, *self.token_ids]

    def take(self, news: JobTokens, now_s: float) -> None:
        """Append what one step has made."""
        self.token_ids += news.token_ids
        if news.logprobs is not None:
            self.logprobs += news.logprobs
        if news.token_ids:
            self.last_s = now_s
            if self.first_s is None:
                self.first_s, self.num_cached_tokens = now_s, news.num_cached_tokens
        self.finish = news.finish or (None if self.max_new_tokens > 0 else FinishReason.LENGTH)
