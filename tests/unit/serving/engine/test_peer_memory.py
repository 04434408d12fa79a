"""Whether a decode unit's captured steps, and the sums of its TP groups, go through peer memory: what the configuration says, and what its GPUs can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.core.config import load_config
from serving.engine import joining
from serving.engine.joining import shares_through_peer_memory, through_peer_memory, writes_peers
from serving.engine.watch import WARM_UP_DEADLINE_S
from serving.kernels.dispatch import Window
from serving.model.parallel import Parallel
from serving.model.published import DEEPSEEK_V3
from serving.model.units import groups_of, shape_of
from serving.parallel.collectives import Handle, RanksMissing, SingleRank
from serving.parallel.peer_memory import PeersUnreachable
from serving.parallel.peer_shares import MOST_BYTES, PeerShares, layout_of
from serving.parallel.symmetric import Exchanged, Symmetric, new_window
from tests.unit.serving.parallel.symmetric_ranks import symmetric_ranks

CPU = torch.device("cpu")


@dataclass
class Watch:
    progress: int = 0
    aborts: list[Callable[[], None]] = field(default_factory=list)
    releases: list[Callable[[], None]] = field(default_factory=list)
    checks: list[Callable[[], None]] = field(default_factory=list)

    def advance(self) -> None:
        self.progress += 1

    def also_aborts(self, abort: Callable[[], None]) -> None:
        self.aborts.append(abort)

    def also_releases(self, release: Callable[[], None]) -> None:
        self.releases.append(release)

    def also_checks(self, check: Callable[[], None]) -> None:
        self.checks.append(check)


def joined(monkeypatch: pytest.MonkeyPatch, opens: Callable[..., Symmetric], *keys: str) -> tuple[Parallel, Watch]:
    monkeypatch.setattr(joining, "open_symmetric", opens)
    keys = ("tp=2", "dp=4", "max_num_seqs=33", "redundant_experts=8", "shared_expert_routed=true", *keys)
    config = load_config(overrides=[f"decode.{key}" for key in keys])
    watch: Any = Watch()
    shape = shape_of(config.decode, DEEPSEEK_V3)
    return through_peer_memory(Parallel(), config, DEEPSEEK_V3, shape, CPU, SingleRank(), watch), watch


def test_captured_steps_are_made_for_the_units_sizes_and_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Exchanged, int]] = []
    ends: list[Symmetric] = []

    def opens(group: object, device: torch.device, exchanged: Exchanged, *, num_windows: int) -> Symmetric:
        opened.append((exchanged, num_windows))
        (end,) = symmetric_ranks(1, exchanged, device, num_windows=num_windows)

        def close() -> None:
            raise RanksMissing([1], group="ep", reason="it is gone")

        end.close = close
        ends.append(end)
        return end

    parallel, watch = joined(monkeypatch, opens, "microbatches=2")
    ((exchanged, num_windows),) = opened
    assert (exchanged.slots_per_rank, exchanged.capacity, exchanged.width) == (33, 17, 7168)
    assert (exchanged.top_k, exchanged.itemsize, num_windows) == (9, 2, 2)
    assert exchanged.deadline_s > WARM_UP_DEADLINE_S
    assert parallel.fixed is not None
    parallel.fixed(17)
    with pytest.raises(AssertionError, match="18 rows where 17 fit"):
        parallel.fixed(18)
    (check,) = watch.checks
    check()
    ends[0].windows[1].given_up[:2] = 1
    with pytest.raises(RanksMissing, match="peer memory"):
        check()
    ends[0].windows[1].given_up.zero_()
    for release in watch.releases:
        release()
    for abort in watch.aborts:
        abort()
    assert all(window.given_up[0] for window in ends[0].windows)


def test_nccl_carries_what_gpus_cannot_unless_they_were_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def opens(*_: object, **__: object) -> Symmetric:
        raise PeersUnreachable("rank 1 cannot reach the memory of the other GPUs")

    parallel, watch = joined(monkeypatch, opens)
    assert parallel.fixed is None
    assert not watch.aborts
    assert not watch.releases
    with pytest.raises(PeersUnreachable, match="rank 1"):
        joined(monkeypatch, opens, "dispatch=symmetric")


def shared(monkeypatch: pytest.MonkeyPatch, opens: Callable[..., PeerShares], *keys: str) -> tuple[Parallel, Watch]:
    monkeypatch.setattr(joining, "open_peer_shares", opens)
    config = load_config(overrides=[f"decode.{key}" for key in keys])
    watch: Any = Watch()
    return shares_through_peer_memory(Parallel(tp=Advances(watch=watch)), config, CPU, SingleRank(), watch), watch


@dataclass(frozen=True, kw_only=True)
class Advances(SingleRank):
    """Tells the watch of its calls, as a unit's groups of GPUs do."""

    watch: Watch

    def reduce_scatter(self, out: Tensor, tensor: Tensor, counts: Sequence[int] | None = None) -> Handle:
        self.watch.advance()
        return super().reduce_scatter(out, tensor, counts)


def window_of_one(device: torch.device) -> Window:
    own = torch.zeros(layout_of(1).num_bytes, dtype=torch.uint8, device=device)
    return new_window(own, [own.data_ptr()], [0], members=[own])


def test_a_rank_is_as_far_whichever_way_its_sums_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of DP groups differ, so that those of one may go through peer memory while another's do not; nobody is behind for that."""

    def opens(group: SingleRank, control: SingleRank, device: torch.device, **keys: Any) -> PeerShares:
        return PeerShares(group, window_of_one(device), **keys)

    parallel, watch = shared(monkeypatch, opens)
    assert isinstance(parallel.tp, PeerShares)
    for num_rows, begun in ((2, 1), (2 * MOST_BYTES // 32, 1), (3, 2)):
        before = watch.progress
        parallel.tp.reduce_scatter(torch.zeros(num_rows, 8), torch.ones(num_rows, 8)).wait()
        assert watch.progress == before + 1
        assert int(parallel.tp.window.state[0]) == begun


def test_a_tp_group_sums_through_peer_memory_and_ends_with_its_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def opens(group: SingleRank, control: SingleRank, device: torch.device, **keys: Any) -> PeerShares:
        return PeerShares(group, window_of_one(device), **keys, close_memory=lambda: closed.append(True))

    parallel, watch = shared(monkeypatch, opens)
    out = torch.zeros(2, 8)
    parallel.tp.reduce_scatter(out, torch.ones(2, 8)).wait()
    assert (out == 1).all()
    assert isinstance(parallel.tp, PeerShares)
    assert int(parallel.tp.window.state[0]) == 1
    assert parallel.tp._deadline_s > WARM_UP_DEADLINE_S
    (release,), (abort,), (check,) = watch.releases, watch.aborts, watch.checks
    check()
    parallel.tp.window.given_up[:2] = 1
    with pytest.raises(RanksMissing, match="peer memory"):
        check()
    parallel.tp.window.given_up.zero_()
    release()
    assert closed
    assert not parallel.tp.window.given_up[0]
    abort()
    assert parallel.tp.window.given_up[0]


def test_a_tp_group_sums_over_nccl_where_gpus_cannot_unless_they_were_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def opens(*_: object, **__: object) -> PeerShares:
        raise PeersUnreachable("rank 1 cannot reach the memory of the other GPUs")

    parallel, watch = shared(monkeypatch, opens)
    assert isinstance(parallel.tp, Advances)
    assert not watch.aborts
    with pytest.raises(PeersUnreachable, match="rank 1"):
        shared(monkeypatch, opens, "dispatch=symmetric")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (("dp=8",), True),
        (("dp=8", "dispatch=symmetric"), True),
        (("dp=8", "dispatch=nccl"), False),
        (("dp=16",), False),
        (("dp=16", "ep=8"), True),
        (("dp=2", "ranks_per_node=1"), False),
        (("dp=8", "ep=1"), False),
        (("tp=4", "dp=80"), False),
    ],
)
def test_gpus_write_each_others_memory_where_an_ep_group_is_on_one_node(keys: tuple[str, ...], expected: bool) -> None:
    table = load_config(overrides=[f"decode.{key}" for key in keys]).decode
    assert writes_peers(table, groups_of(table)) == expected
