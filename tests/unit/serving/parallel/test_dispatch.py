"""Tokens to the ranks of their experts and back come to what one rank with all experts computes, whoever carries them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.parallel.collectives import Collectives, Handle, SingleRank
from serving.parallel.virtual import VirtualCollectives, VirtualUnit
from tests.unit.serving.parallel import dispatch_cases
from tests.unit.serving.parallel.dispatch_cases import FORMS, Layer, make_dispatch
from tests.unit.serving.parallel.rank_processes import RankProcesses

IMPLEMENTATIONS = ["single", "virtual", "shared_memory", "gloo"]
ROUTINGS = ["random", "to rank 1", "same rank", "replicated", "partial"]
IDLE = (5, 0, 3, 8)
ONCE = tuple(range(12))
COPIES = (3, 0, 1, 2, 4, 1, 0, 1, 5, 2, 4, 4)

NAMES = itertools.count()

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    ranks = RankProcesses(4, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(params=IMPLEMENTATIONS)
def run(request: pytest.FixtureRequest) -> Run:
    """Form, layer and harm -> the sums on each rank. A layer of four ranks; one takes its first rank's tokens and all slots."""
    if request.param == "single":
        return lambda form, layer, *harm: [dispatch_cases.dispatched(SingleRank(), form, _on_one(layer), "", *harm)]
    if request.param == "virtual":
        return lambda form, layer, *harm: VirtualUnit(layer.groups).run(
            lambda group: dispatch_cases.dispatched(group, form, layer, "", *harm)
        )
    processes: RankProcesses = request.getfixturevalue("processes")
    return lambda form, layer, *harm: processes.run(request.param, "dispatched", form, layer, f"-{next(NAMES)}", *harm)


def _on_one(layer: Layer) -> Layer:
    return replace(layer, num_tokens=layer.num_tokens[:1], ranks_per_node=1)


def _layer(routing: str, dtype: str = "float32") -> Layer:
    return Layer(
        num_tokens=IDLE, slots=COPIES if routing == "replicated" else ONCE, top_k=3, routing=routing, dtype=dtype
    )


def _equal(results: list[list[list[float]]], layer: Layer) -> bool:
    """Up to the order of sums."""
    bound = 1e-6 if layer.dtype == "float32" else 1e-13
    errors = []
    for rank, result in enumerate(results):
        want = layer.expected(rank).double()
        got = torch.tensor(result, dtype=torch.float64).view(want.shape)
        errors.append(float((got - want).abs().max() / want.abs().max().clamp(min=1.0)) if len(want) else 0.0)
    return max(errors) < bound


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_ranks_together_compute_what_one_computes(run: Run, form: str, routing: str) -> None:
    layer = _layer(routing)
    results = run(form, layer)
    assert _equal(results, layer if len(results) == 4 else _on_one(layer))


@pytest.mark.parametrize("harm", ["there", "back"])
@pytest.mark.parametrize("form", FORMS)
def test_two_rows_that_are_swapped_on_the_way_are_seen(run: Run, form: str, harm: str) -> None:
    layer = _layer("random")
    results = run(form, layer, harm)
    assert not _equal(results, layer if len(results) == 4 else _on_one(layer))


@pytest.mark.parametrize("form", FORMS)
def test_a_unit_without_tokens_goes_through_the_same_calls(run: Run, form: str) -> None:
    assert all(result == [] for result in run(form, replace(_layer("random"), num_tokens=(0, 0, 0, 0))))


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    num_nodes, per_node, slots_per_rank = (draw(st.integers(1, most)) for most in (3, 3, 3))
    world_size = num_nodes * per_node
    num_slots = world_size * slots_per_rank
    num_experts = draw(st.integers(max(1, num_slots - 4), num_slots))
    copies = draw(
        st.lists(st.integers(0, num_experts - 1), min_size=num_slots - num_experts, max_size=num_slots - num_experts)
    )
    routing = draw(st.sampled_from(ROUTINGS))
    few = slots_per_rank if routing in ("to rank 1", "same rank") else num_experts
    return Layer(
        num_tokens=tuple(draw(st.lists(st.integers(0, 6), min_size=world_size, max_size=world_size))),
        slots=tuple(draw(st.permutations([*range(num_experts), *copies]))),
        top_k=draw(st.integers(1, min(few, 4))),
        routing=routing,
        ranks_per_node=per_node,
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, deadline=None)
@given(layer=layers(), form=st.sampled_from(FORMS))
def test_any_unit_with_any_routing_computes_what_one_rank_computes(layer: Layer, form: str) -> None:
    unit = VirtualUnit(layer.groups)
    assert _equal(unit.run(lambda group: dispatch_cases.dispatched(group, form, layer, "")), layer)


@pytest.mark.parametrize("form", FORMS)
def test_32_ranks_on_four_nodes_compute_what_one_computes(form: str) -> None:
    """256 experts and 32 copies, some ranks idle."""
    some = torch.Generator().manual_seed(2)
    spare = torch.randint(256, (32,), generator=some)
    slots = torch.cat([torch.arange(256), spare])[torch.randperm(288, generator=some)]
    layer = Layer(
        num_tokens=tuple(torch.randint(13, (32,), generator=some).clamp(min=3).sub(3).tolist()),
        slots=tuple(slots.tolist()),
        top_k=8,
        routing="replicated",
        ranks_per_node=8,
    )
    assert 0 in layer.num_tokens

    def run(harm: str = "") -> list[Any]:
        return VirtualUnit(layer.groups).run(lambda group: dispatch_cases.dispatched(group, form, layer, "", harm))

    assert _equal(run(), layer)
    assert not _equal(run("there"), layer)


@pytest.mark.parametrize("form", FORMS)
def test_a_sum_has_the_same_bits_in_any_batch(form: str) -> None:
    """Rank 3's first tokens with seven others, of whom some are its own, and alone."""
    layer = Layer(num_tokens=(5, 6, 0, 8), slots=ONCE, top_k=6, dtype="float32")
    few = replace(layer, num_tokens=(0, 0, 0, 8))

    def apart(layer: Layer) -> Any:
        """A row's result depends on nothing but the row here; a product may round it otherwise among others."""

        def main(group: VirtualCollectives) -> Any:
            dispatch = make_dispatch(form, group, layer)
            sending = dispatch.send(*layer.tokens(group.rank))
            arrived = sending.wait()
            used = (arrived.slots_RK >= 0).any(1, keepdim=True)
            y = arrived.x_RD * (1.1 + group.rank) * used
            return dispatch.give_back(sending, y).wait()

        return VirtualUnit(layer.groups).run(main)[3]

    assert torch.equal(apart(layer), apart(few))
    x, slots, _ = layer.tokens(3)
    backwards = torch.zeros_like(x)
    for rank in (3, 2, 1, 0):
        backwards += x * (1.1 + rank) * (slots // 3 == rank).any(1, keepdim=True)
    assert not torch.equal(apart(layer), backwards)


@pytest.mark.parametrize("form", FORMS)
def test_fp8_rows_arrive_as_such_and_bf16_returns(form: str) -> None:
    layer = Layer(num_tokens=(5, 0, 3, 8), slots=ONCE, top_k=4, width=256, dtype="bfloat16")

    def errors(harm: str = "") -> list[float]:
        return VirtualUnit(layer.groups).run(lambda group: dispatch_cases.moved_in_fp8(group, form, layer, harm))

    # Sums are rounded once, by nodes at each node and once more.
    assert max(errors()) <= 2**-7
    assert max(errors("there")) > 0.1


class Noting:
    """A group that writes down what is called."""

    def __init__(self, group: Collectives, name: str, calls: list[tuple[str, str, int]]) -> None:
        self.rank, self.ranks, self.world_size = group.rank, group.ranks, group.world_size
        self._group, self._name, self._calls = group, name, calls

    def subgroup(self, ranks: Any, name: str, deadline_s: float | None = None) -> Noting:
        return Noting(self._group.subgroup(ranks, name, deadline_s), name, self._calls)

    def all_to_all(self, outs: Any, tensors: Any, recv_counts: Any, send_counts: Any) -> Handle:
        self._calls.append((self._name, "all_to_all", len(tensors)))
        return self._group.all_to_all(outs, tensors, recv_counts, send_counts)


@pytest.mark.parametrize("form", FORMS)
def test_every_rank_makes_the_same_calls_whatever_its_tokens(form: str) -> None:
    def calls(layer: Layer) -> list[list[tuple[str, str, int]]]:
        def main(group: VirtualCollectives) -> list[tuple[str, str, int]]:
            noted: list[tuple[str, str, int]] = []
            dispatch_cases.dispatched(Noting(group, "ep", noted), form, layer, "")  # type: ignore[arg-type]
            return noted

        return VirtualUnit(layer.groups).run(main)

    expected = {
        "direct": [("ep", 1), ("ep", 2), ("ep", 1)],
        "fixed": [("ep", 2), ("ep", 1)],
        "hierarchical": [("rail", 1), ("node", 1), ("rail", 2), ("node", 2), ("node", 1), ("rail", 1)],
    }[form]
    for routing, num_tokens in itertools.product(ROUTINGS, [IDLE, (0, 0, 0, 0), (0, 9, 0, 0)]):
        for of_rank in calls(replace(_layer(routing), num_tokens=num_tokens)):
            assert [(name, payloads) for name, _, payloads in of_rank] == expected


@pytest.mark.parametrize("form", FORMS)
def test_steps_can_be_taken_one_by_one_and_another_layer_in_between(form: str) -> None:
    """As two micro-batches do: each step is issued before the other's is waited for."""
    one, other = _layer("random"), replace(_layer("random"), seed=7, num_tokens=(2, 2, 9, 0))

    def main(group: VirtualCollectives) -> list[list[list[float]]]:
        dispatch = make_dispatch(form, group, one)
        sendings = [dispatch.send(*layer.tokens(group.rank)) for layer in (one, other)]
        while sendings[0].num_more:
            for sending in sendings:
                sending.advance()
        returning = []
        for layer, sending in zip((one, other), sendings, strict=True):
            arrived = sending.wait()
            assert sending.wait() is arrived
            y = dispatch_cases.compute(layer, group.rank, arrived.x_RD, arrived.slots_RK, arrived.weights_RK)
            returning.append(dispatch.give_back(sending, y))
        for way in (*returning, *returning):
            way.advance()
        return [way.wait().tolist() for way in returning]

    results = VirtualUnit(one.groups).run(main)
    assert _equal([of_rank[0] for of_rank in results], one)
    assert _equal([of_rank[1] for of_rank in results], other)
    assert not _equal([of_rank[1] for of_rank in results], replace(other, seed=8))
