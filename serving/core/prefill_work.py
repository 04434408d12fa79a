"""What a prompt costs to prefill, in tokens' worth of products: attention grows with the square of its length, all else with its length."""

from __future__ import annotations


def prefill_work(start: int, end: int, pair_cost: float) -> int:
    """Of the tokens from `start` to `end` of a text, each of which attends to all before it and itself. `pair_cost`: what attending one token
    to one other costs, as a share of all else that a token costs; 0 where only tokens count."""
    pairs = (end * (end + 1) - start * (start + 1)) // 2
    return end - start + round(pair_cost * pairs)
