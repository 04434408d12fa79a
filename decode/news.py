"""What a settled step says to a router of one job: its new tokens, several where drafts were accepted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from decode.scheduler import TokenEvent
from serving.core.messages import JobTokens


def by_job(events: Iterable[TokenEvent]) -> Iterator[list[TokenEvent]]:
    """Those of a job stand side by side."""
    for _, of_job in groupby(events, lambda event: event.sequence.job_id):
        yield list(of_job)


def job_tokens(events: list[TokenEvent], *, num_cached_tokens: int = 0) -> JobTokens:
    """Of one job and one step."""
    last = events[-1]
    logprobs = [event.logprobs for event in events if event.logprobs is not None]
    return JobTokens(
        job_id=last.sequence.job_id,
        token_ids=[event.token_id for event in events],
        logprobs=logprobs or None,
        finish=last.finish,
        num_cached_tokens=num_cached_tokens,
    )
