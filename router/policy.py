"""Which prefill and which decode worker a job goes to, chosen together.

Prefill: the least work waiting, which is tokens and what they attend to. Decode: the least share of pages promised and of requests together,
each measured by who has most. Ties go round. Pure; must not know sockets, queues or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvcache.layout import PAGE_TOKENS, num_pages_for
from router.view import View, Worker


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a life needs. `prompt_pages`: prefill's pool. `credit_pages`: promised by decode now; `total_pages`: at its longest.

    `avoid` names workers that have just failed this request; they are taken only if there is no other.
    """

    num_tokens: int
    prompt_pages: int
    credit_pages: int
    total_pages: int
    wants_decode: bool
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Placement:
    """`decode` is None where `prefill` goes on alone: a worker of role `both`, or no second token wanted."""

    prefill: Worker
    decode: Worker | None


def demand(
    num_tokens: int, max_new_tokens: int, expected_new_tokens: int, avoid: frozenset[str] = frozenset()
) -> Demand:
    """Of a life that starts with `num_tokens` tokens and may add `max_new_tokens`."""
    return Demand(
        num_tokens=num_tokens,
        prompt_pages=num_pages_for(num_tokens),
        credit_pages=num_pages_for(num_tokens + min(max_new_tokens, expected_new_tokens)),
        total_pages=num_pages_for(num_tokens + max_new_tokens),
        wants_decode=max_new_tokens > 1,
        avoid=avoid,
    )


def choose(view: View, need: Demand, turn: int) -> Placement | None:
    """None: no room now. `turn` rises by one a call and breaks ties."""
    workers = _rotated([worker for worker in view if worker.usable], turn)
    prefill = _best(
        (w for w in workers if w.role == "prefill" and w.num_pages >= need.prompt_pages),
        need,
        lambda w: w.waiting_work,
    )
    decodes = [w for w in workers if w.role == "decode" and _has_credit(w, need)]
    decode = _best(decodes, need, _decode_load(decodes))
    if prefill is not None and not need.wants_decode:
        return Placement(prefill, None)
    if prefill is not None and decode is not None:
        return Placement(prefill, decode)
    both = _best((w for w in workers if w.role == "both" and _has_credit(w, need)), need, lambda w: w.waiting_work)
    return None if both is None else Placement(both, None)


def missing_role(view: View) -> str | None:
    """The role for want of which nothing can be served, or None."""
    roles = {worker.role for worker in view if worker.usable}
    if "both" in roles or {"prefill", "decode"} <= roles:
        return None
    return "decode" if "prefill" in roles else "prefill"


def capacity_tokens(view: View) -> int | None:
    """The longest sequence that any pair of pools in sight could hold; None while there is no pair."""
    largest = dict.fromkeys(("prefill", "decode", "both"), 0)
    for worker in view:
        largest[worker.role] = max(largest.get(worker.role, 0), worker.num_pages)
    pages = max(min(largest["prefill"], largest["decode"]), largest["both"])
    return pages * PAGE_TOKENS or None


def _has_credit(worker: Worker, need: Demand) -> bool:
    return worker.credit_pages >= need.credit_pages and worker.num_pages >= need.total_pages


def _rotated(workers: list[Worker], turn: int) -> list[Worker]:
    start = turn % len(workers) if workers else 0
    return workers[start:] + workers[:start]


def _decode_load(workers: Sequence[Worker]) -> Callable[[Worker], float]:
    """A step takes longer by every context that it reads and by every row: neither shows in the other."""
    most_pages = max((w.promised_pages for w in workers), default=0) or 1
    most_requests = max((w.num_requests for w in workers), default=0) or 1
    return lambda w: w.promised_pages / most_pages + w.num_requests / most_requests


def _best(workers: Iterable[Worker], need: Demand, cost: Callable[[Worker], float]) -> Worker | None:
    """The first of the cheapest; one that is to be avoided is dearer than any other."""
    return min(workers, key=lambda worker: (worker.worker_id in need.avoid, cost(worker)), default=None)
