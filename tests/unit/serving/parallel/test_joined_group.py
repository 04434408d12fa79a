"""Groups over torch's backends in one process: who is named where the store answers late, joins take long, or the store goes first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn

import pytest
import torch

from serving.parallel import distributed
from serving.parallel.collectives import Presence, RanksMissing
from serving.parallel.distributed import TorchCollectives

DEADLINE_S = 0.8


def joined(**more: Any) -> TorchCollectives:
    store = torch.distributed.HashStore()
    return TorchCollectives(backend="gloo", store=store, ranks=(4,), rank=0, name="tp", deadline_s=DEADLINE_S, **more)


class JustMissed(Future[Any]):
    """Comes between the end of a look at it and what is done about that."""

    looked = False

    def result(self, timeout: float | None = None) -> Any:
        if self.looked:
            return super().result(timeout)
        self.looked = True
        super().exception()
        raise TimeoutError


def test_an_answer_that_comes_as_a_look_ends_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    group = joined()
    monkeypatch.setattr(distributed, "Future", JustMissed)
    assert group._answer(lambda: 7) == 7

    def late() -> int:
        raise TimeoutError("the store's own")

    with pytest.raises(TimeoutError, match="the store's own"):
        group._answer(late)


def test_who_never_joins_is_named_although_others_came_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 4 waits for rank 5 and then as long again for rank 6: longer than for any answer, and the store is not to blame."""
    monkeypatch.setattr(distributed, "_LAST_CALL_S", 0.1)
    store = torch.distributed.HashStore()

    def named(index: int) -> tuple[int, ...]:
        time.sleep(0.7 * DEADLINE_S * index)
        with pytest.raises(RanksMissing) as missing:
            TorchCollectives(
                backend="gloo", store=store, ranks=(4, 5, 6), rank=index, name="world", deadline_s=DEADLINE_S
            )
        return missing.value.ranks

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(named, range(2))) == [(6,), (6,)]


class Hears:
    """Of the unit's ranks, that `gone` have ended."""

    def __init__(self, *gone: int) -> None:
        self.gone = gone

    def advance(self) -> None:
        """Nobody asks."""

    def reach(self, far: int) -> None:
        """Nor how far."""

    def check(self) -> None:
        if self.gone:
            raise RanksMissing(self.gone, group="bell", reason="its connection has ended")

    def give_up(self, ranks: Sequence[int] = ()) -> NoReturn:
        raise AssertionError(f"{ranks} are not asked for")


class Gone:
    """A store, or a backend, whose other end has ended."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name}: connection reset by peer")


@pytest.mark.parametrize(("gone", "named"), [((7,), (7,)), ((), (0,))])
def test_where_the_store_is_gone_for_anothers_sake_that_one_is_named(
    gone: tuple[int, ...], named: tuple[int, ...]
) -> None:
    heard: list[Presence] = []
    group = joined(presence=lambda: heard[0] if heard else None)
    heard.append(Hears(*gone))
    vars(group).update(_store=Gone(), _group=Gone())
    with pytest.raises(RanksMissing) as missing:
        group.all_gather(torch.zeros(1, 8), torch.ones(1, 8))
    assert missing.value.ranks == named
