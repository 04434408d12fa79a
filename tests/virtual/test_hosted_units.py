"""The report's exploration at its own size: 32 ranks host 16 experts each, and of those the best 9 compute a layer's tokens."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from serving.bench.units import Unit
from serving.bench.virtual import Run, report_of, run_units
from serving.parallel.dispatch import Dispatch
from serving.parallel.placement import Ints
from tests.virtual.recorded import Recorded

SIZES = (
    "prefill.hosted_slots=16",
    # A decode unit that hosts too, of 8 ranks: 40 of 48 experts in use.
    "decode.dp=2",
    "decode.ep=8",
    "decode.shared_expert_routed=false",
    "decode.hosted_slots=48",
)
ACTIVE = {"prefill": 9, "decode": 40}
pytestmark = pytest.mark.timeout(300)

Chosen = dict[str, dict[int, list[Ints]]]


@pytest.fixture(scope="module")
def run_and_chosen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Chosen]:
    chosen: Chosen = {"prefill": defaultdict(list), "decode": defaultdict(list)}

    def wrap(role: str, rank: int, dispatch: Dispatch) -> Dispatch:
        return Recorded(dispatch, chosen[role][rank])  # type: ignore[return-value]

    folder = tmp_path_factory.mktemp("model")
    run = run_units("paper-32-320", folder, num_requests=64, new_tokens=4, seed=0, overrides=SIZES, wrap=wrap)
    return run, chosen


def test_texts_are_those_of_one_rank(run_and_chosen: tuple[Run, Chosen]) -> None:
    run, _ = run_and_chosen
    assert run.prefill.sizes.shape.hosted_slots == 16
    assert run.prefill.sizes.split_from > 0, "two micro-batches"
    assert len(run.texts) == 64
    assert run.texts == run.expected


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_no_rank_uses_more_slots_than_it_may(run_and_chosen: tuple[Run, Chosen], role: str) -> None:
    run, chosen = run_and_chosen
    unit, layers = unit_of(run, role), _by_layer(chosen[role])
    most = max(int(_slots_in_use(layer, unit).max()) for layer in layers)
    assert most <= ACTIVE[role] < unit.sizes.shape.hosted_slots
    if role == "prefill":
        # It has the tokens to use what it may; and not always the same ones.
        assert most == ACTIVE[role]
        assert _slots_in_use(np.concatenate(layers), unit).min() > most


def test_one_slot_more_would_be_noticed(run_and_chosen: tuple[Run, Chosen]) -> None:
    run, chosen = run_and_chosen
    layers = _by_layer(chosen["prefill"])
    fullest = max(layers, key=lambda layer: int(_slots_in_use(layer, run.prefill).max()))
    rank = int(_slots_in_use(fullest, run.prefill).argmax())
    unused = next(slot for slot in range(16 * rank, 16 * rank + 16) if slot not in fullest)
    fullest[0] = unused
    assert _slots_in_use(fullest, run.prefill).max() > ACTIVE["prefill"]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_loads_are_more_even_than_under_a_static_placement(run_and_chosen: tuple[Run, Chosen], role: str) -> None:
    report = report_of(run_and_chosen[0])[role]
    chosen, static = np.array(report["balance_by_layer"]), np.array(report["static_balance_by_layer"])
    assert len(chosen) == 3
    assert chosen.min() > 0.93
    assert (chosen > static + 0.08).all()


def unit_of(run: Run, role: str) -> Unit:
    return run.prefill if role == "prefill" else run.decode


def _by_layer(of_ranks: dict[int, list[Ints]]) -> list[Ints]:
    """The slots of all ranks' picks in each dispatch: every rank takes part in all of them, in one order."""
    return [np.concatenate([slots.ravel() for slots in layer]) for layer in zip(*of_ranks.values(), strict=True)]


def _slots_in_use(slots: Ints, unit: Unit) -> Ints:
    """Of each rank."""
    sizes = unit.sizes
    is_used = np.bincount(slots, minlength=sizes.placement.slots.shape[1]) > 0
    counts: Ints = is_used.reshape(sizes.groups.ep, -1).sum(axis=1)
    return counts
