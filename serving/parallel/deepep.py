"""Dispatch by the library DeepEP, where it is installed and chosen: the GPUs of one host, over NVLink.

    counts, of which this host waits for its own; rows | sums back         on a stream of DeepEP's, which takes 20 processors

What arrives, and in which order, is what `DirectDispatch` brings. The host's wait means that no step of it can be captured: captured
decode steps dispatch by other means, since DeepEP's way for them needs NVSHMEM, and in the release that was tried (1.0.0) InfiniBand
adapters even inside a host.
A rank that does not come is noticed by DeepEP after 100 s.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from serving.core.errors import ConfigError
from serving.parallel.dispatch import Arrived, Returning, Sending, Steps
from serving.parallel.hops import X, payloads_of, plus, rows_like

_WORLD_SIZES = (2, 4, 8)
_MOST_SLOTS = 128
"""Of a rank. Both: what DeepEP's kernels are compiled for."""


def deepep_dispatch(
    store: Store, *, rank: int, world_size: int, slots_per_rank: int, row_bytes: int, deadline_s: float
) -> DeepEpDispatch:
    """Joins an EP group whose ranks are alone with `store`, each on its current GPU. `row_bytes`: most that a token's hidden
    state takes on its way. Raises ConfigError."""
    if world_size not in _WORLD_SIZES:
        raise ConfigError(
            f'dispatch = "deepep" is for EP groups of 2, 4 or 8 GPUs of one host, not of {world_size}; choose another dispatch'
        )
    if slots_per_rank > _MOST_SLOTS:
        raise ConfigError(
            f'dispatch = "deepep" takes at most {_MOST_SLOTS} experts a GPU, here are {slots_per_rank}; raise ep, or choose '
            "another dispatch"
        )
    try:
        deep_ep = importlib.import_module("deep_ep")
    except ImportError as error:
        raise ConfigError(
            f'dispatch = "deepep" needs the package deep_ep ({error}); build it from https://github.com/deepseek-ai/DeepEP '
            "for this torch, or choose another dispatch"
        ) from error
    group = _process_group(store, rank, world_size, deadline_s)
    configs = deep_ep.Buffer.get_dispatch_config(world_size), deep_ep.Buffer.get_combine_config(world_size)
    num_bytes = max(config.get_nvl_buffer_size_hint(row_bytes, world_size) for config in configs)
    return DeepEpDispatch(deep_ep.Buffer(group, num_bytes, 0), slots_per_rank)


def _process_group(store: Store, rank: int, world_size: int, deadline_s: float) -> dist.ProcessGroup:
    """What DeepEP's ranks tell one another where their memory is by: gloo, and nothing global."""
    group = dist.ProcessGroup(store, rank, world_size)
    gloo = dist.ProcessGroupGloo(store, rank, world_size, timedelta(seconds=deadline_s))
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    return group


@dataclass(frozen=True)
class _OnStream:
    """A handle of what DeepEP does on its stream."""

    event: Any

    def wait(self) -> None:
        self.event.current_stream_wait()


class _Sent(Sending[X]):
    """`ways`: where DeepEP sent which row, by which it finds back."""

    def __init__(self, steps: Steps[Arrived[X]], ways: Any) -> None:
        super().__init__((), steps, 0)
        self.ways = ways


class DeepEpDispatch:
    """One rank's end. `buffer`: deep_ep.Buffer of the EP group, whose rank r holds slots from r * slots_per_rank on."""

    def __init__(self, buffer: Any, slots_per_rank: int) -> None:
        self._buffer = buffer
        self._num_slots = slots_per_rank * buffer.group_size

    def send(self, x: X, slots_TK: Tensor, weights_TK: Tensor) -> Sending[X]:
        slots_TK = slots_TK.contiguous()
        rows_W, _, rows_S, wanted_TW, _ = self._buffer.get_dispatch_layout(slots_TK, self._num_slots, async_finish=True)
        payloads = [payload.contiguous() for payload in payloads_of(x)]
        arriving, slots_RK, weights_RK, _, ways, event = self._buffer.dispatch(
            tuple(payloads) if len(payloads) > 1 else payloads[0],
            topk_idx=slots_TK,
            topk_weights=weights_TK.contiguous(),
            num_tokens_per_rank=rows_W,
            is_token_in_rank=wanted_TW,
            num_tokens_per_expert=rows_S,
            async_finish=True,
        )
        payloads_R = arriving if isinstance(arriving, tuple) else (arriving,)
        return _Sent(_arrived(x, event, payloads_R, slots_RK, weights_RK), ways)

    def give_back(self, sending: Sending[X], y_RD: Tensor, added_TD: Tensor | None = None) -> Returning:
        assert isinstance(sending, _Sent), "what another dispatch has sent"
        sums_TD, _, event = self._buffer.combine(y_RD.contiguous(), sending.ways, async_finish=True)
        return Returning(_returned(event, sums_TD, added_TD), 0)


def _arrived(x: X, event: Any, payloads: Sequence[Tensor], slots_RK: Tensor, weights_RK: Tensor) -> Steps[Arrived[X]]:
    yield [_OnStream(event)]
    return Arrived(x_RD=rows_like(x, payloads), slots_RK=slots_RK, weights_RK=weights_RK)


def _returned(event: Any, sums_TD: Tensor, added_TD: Tensor | None) -> Steps[Tensor]:
    yield [_OnStream(event)]
    return plus(sums_TD, added_TD)
