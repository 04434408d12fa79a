"""How many tokens each expert has had of late. Time is an argument; adding up the ranks of a unit is the caller's."""

from __future__ import annotations

import numpy as np

from serving.parallel.placement import Floats, Ints


class ExpertLoads:
    """Tokens [layers, experts], each counted half after `half_life_s` seconds, a quarter after two, and so on.

    Counters of ranks that read the same clock may be added up.
    """

    def __init__(self, *, num_layers: int, num_experts: int, half_life_s: float) -> None:
        assert half_life_s > 0
        self._tokens = np.zeros((num_layers, num_experts))
        self._half_life_s = half_life_s
        self._counted_s = 0.0

    def add(self, tokens: Ints, *, now_s: float) -> None:
        """`tokens` [layers, experts] of one or more steps that ended at `now_s`."""
        assert tokens.shape == self._tokens.shape
        self._tokens = self.at(now_s) + tokens
        self._counted_s = now_s

    def at(self, now_s: float) -> Floats:
        """[layers, experts], a copy. `now_s` is not before the latest `add`."""
        assert not self._tokens.any() or now_s >= self._counted_s
        decayed: Floats = self._tokens * 0.5 ** ((now_s - self._counted_s) / self._half_life_s)
        return decayed


def with_shared_expert(loads: Floats, *, experts_per_token: int) -> Floats:
    """[layers, experts + 1]: the shared expert as the last logical expert. Every token selects it, so its load is the token count."""
    return np.concatenate([loads, loads.sum(axis=1, keepdims=True) / experts_per_token], axis=1)
