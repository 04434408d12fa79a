"""Groups over torch's backends in one process: who is named where the store answers late, joins take long, or the store goes first."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import torch

from serving.parallel import distributed
from serving.parallel.distributed import TorchCollectives

DEADLINE_S = 1.2


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
