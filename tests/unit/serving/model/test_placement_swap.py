"""Experts that change their places in the middle of 64 generations change no token: made, aborted at any phase, or never finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.parallel import Parallel, num_moe_layers
from serving.model.weights import load_weights
from serving.parallel.collectives import RanksMissing
from serving.parallel.dispatch import DirectDispatch
from serving.parallel.groups import Groups
from serving.parallel.placement import Placement
from serving.parallel.rebalance import Policy, Rebalancer, Trigger
from serving.parallel.transaction import LivePlacement, Phase
from serving.parallel.virtual import Fault, VirtualCollectives, VirtualUnit
from tests.model_factory import make_checkpoint
from tests.unit.serving.model.paged import Paged

DTYPE = torch.float64
NUM_EXPERTS = 8
UNITS = {
    "TP1 x DP4": Groups(tp=1, dp=4, ep=4, ranks_per_node=4),
    "TP2 x DP2": Groups(tp=2, dp=2, ep=4, ranks_per_node=4),
}
NUM_TEXTS = 64
NUM_TOKENS = 16

Texts = dict[str, list[int]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> Texts:
    """Of a single rank."""
    with torch.inference_mode():
        model = load_weights(folder, ModelConfig.from_folder(folder), DTYPE)
        return dict(generate(model, range(NUM_TEXTS), lambda: None))


def generate(model: DeepseekV3, numbers: range, before_step: Callable[[], None], texts: Texts | None = None) -> Texts:
    """Greedy, all texts together; `texts` grows meanwhile."""
    texts = {} if texts is None else texts
    run = Paged(model, num_pages=NUM_TEXTS)
    before_step()
    logits = run.prefill(
        {f"{number}": [(7 * number + place) % 100 for place in range(1 + number % 9)] for number in numbers}
    )
    for _ in range(NUM_TOKENS):
        tokens = {name: int(rows[-1].argmax()) for name, rows in logits.items()}
        for name, token in tokens.items():
            texts.setdefault(name, []).append(token)
        before_step()
        logits = run.decode(tokens)
    return texts


@dataclass
class Rank:
    """What a rank has done."""

    live: LivePlacement
    texts: Texts = field(default_factory=dict)
    phases: list[tuple[int, Phase]] = field(default_factory=list)
    """The version and phase in each step."""
    num_calls: list[int] = field(default_factory=list)


def play(
    folder: Path,
    groups: Groups,
    *,
    abort_at: Phase | None = None,
    is_routing_told: bool = True,
    from_file: bool = False,
    balanced: bool = False,
    shared_is_routed: bool = False,
    fault: Fault | None = None,
) -> tuple[list[Rank], VirtualUnit]:
    """A change, from the third step on, or as often as balancing wants one."""
    config = ModelConfig.from_folder(folder)
    num_experts = NUM_EXPERTS + shared_is_routed
    policy = Policy(num_experts=num_experts, num_slots=12, num_gpus=4)
    present = policy.initial(num_moe_layers(config))
    loads = np.random.default_rng(1).lognormal(0, 1, present.copies.shape)
    target = policy.place(present, loads)
    unit, ranks = VirtualUnit(groups, faults=[fault] if fault else []), dict[int, Rank]()

    def main(world: VirtualCollectives) -> None:
        ep = world.subgroup(range(4), "ep")
        parallel = Parallel(
            tp=world.subgroup(groups.tp_group(world.rank), "tp"),
            experts=DirectDispatch(ep, present.slots_per_gpu),
            placement=present,
            ep_rank=world.rank,
            shared_is_routed=shared_is_routed,
        )
        with torch.inference_mode():
            model = load_weights(folder, config, DTYPE, parallel=parallel)
            assert model.routing is not None
            originals: dict[tuple[int, int], list[Tensor]] = {}
            if from_file:
                whole = load_weights(folder, config, DTYPE).expert_slots
                originals = {(layer, e): whole.read(layer, e) for layer in range(3) for e in range(NUM_EXPERTS)}
            live = LivePlacement(
                control=world.subgroup(range(4), "control"),
                data=world.subgroup(range(4), "weights"),
                slots=model.expert_slots,
                placement=present,
                budget_bytes=100_000,
                ranks_per_node=4,
                staged_layers=len(present.slots),
                load_expert=(lambda layer, expert: originals[layer, expert]) if from_file else None,
                on_commit=model.routing.place if is_routing_told else lambda _: None,
            )
            rank = ranks[world.rank] = Rank(live)
            before_step = balancing(rank, model, policy) if balanced else changing(rank, target, world, abort_at)

            def counted() -> None:
                rank.num_calls.append(unit._num_calls[world.rank])
                before_step()
                rank.phases.append((live.version, live.phase))

            share = NUM_TEXTS // groups.dp
            first = share * groups.coordinates(world.rank).dp_rank
            generate(model, range(first, first + share), counted, rank.texts)

    if fault is None:
        unit.run(main)
    else:
        with pytest.raises(RanksMissing):
            unit.run(main)
    return [ranks[number] for number in sorted(ranks)], unit


def changing(rank: Rank, target: Placement, world: VirtualCollectives, abort_at: Phase | None) -> Callable[[], None]:
    steps = rank.live.change(target)

    def before_step() -> None:
        if len(rank.phases) >= 2:
            next(steps, None)
        if world.rank == 1 and rank.live.phase is abort_at:
            rank.live.abort()

    return before_step


def balancing(rank: Rank, model: DeepseekV3, policy: Policy) -> Callable[[], None]:
    """As a step loop does it."""
    rebalancer = Rebalancer(
        live=rank.live,
        policy=policy,
        trigger=Trigger(period_s=1.0, threshold=0.0),
        half_life_s=100.0,
        look_every=1,
        now_s=0.0,
        routed_top_k=model.config.num_experts_per_token if policy.num_experts > NUM_EXPERTS else None,
    )

    def before_step() -> None:
        assert model.routing is not None
        now_s = float(len(rank.phases))
        rebalancer.count(model.routing.num_tokens_LE.numpy(), now_s=now_s)
        model.routing.num_tokens_LE.zero_()
        rebalancer.step(now_s=now_s)

    return before_step


def texts_of(ranks: list[Rank]) -> Texts:
    """TP ranks have the same."""
    texts: Texts = {}
    for rank in ranks:
        for name, tokens in rank.texts.items():
            assert texts.setdefault(name, tokens) == tokens
    return texts


@pytest.mark.parametrize(("unit", "shared_is_routed"), [("TP1 x DP4", True), ("TP2 x DP2", False)])
def test_a_swap_in_the_middle_of_64_generations_changes_no_token(
    folder: Path, expected: Texts, unit: str, shared_is_routed: bool
) -> None:
    ranks, _ = play(folder, UNITS[unit], shared_is_routed=shared_is_routed)
    assert [rank.live.version for rank in ranks] == [2] * 4
    versions = [version for version, _ in ranks[0].phases]
    assert 3 < versions.index(2) < NUM_TOKENS - 3
    assert texts_of(ranks) == expected
    # Swapped weights under the routing of before are another model.
    assert texts_of(play(folder, UNITS[unit], shared_is_routed=shared_is_routed, is_routing_told=False)[0]) != expected


@pytest.mark.parametrize("phase", [Phase.PLANNED, Phase.PREPARING, Phase.PREPARED])
def test_nor_does_one_that_is_aborted(folder: Path, expected: Texts, phase: Phase) -> None:
    ranks, _ = play(folder, UNITS["TP2 x DP2"], abort_at=phase)
    # Whoever is prepared has voted.
    ended = (2, Phase.RECLAIMED) if phase is Phase.PREPARED else (1, Phase.ABORTED)
    assert [(rank.live.version, rank.live.phase) for rank in ranks] == [ended] * 4
    assert texts_of(ranks) == expected


def test_nor_does_one_from_weights_in_host_memory(folder: Path, expected: Texts) -> None:
    ranks, unit = play(folder, UNITS["TP1 x DP4"], from_file=True)
    assert [rank.live.version for rank in ranks] == [2] * 4
    assert texts_of(ranks) == expected
    assert not any(name == "weights" for name, _, _ in unit.traffic)


def test_a_rank_that_dies_while_preparing_leaves_no_wrong_token(folder: Path, expected: Texts) -> None:
    groups = UNITS["TP1 x DP4"]
    whole, _ = play(folder, groups)
    dies_in = [phase for _, phase in whole[2].phases].index(Phase.PREPARING) + 1
    ranks, unit = play(folder, groups, fault=Fault(rank=2, call=whole[2].num_calls[dies_in]))
    assert {number: getattr(error, "ranks", error) for number, error in unit.errors.items()} == dict.fromkeys(
        range(4), (2,)
    )
    survivors = [rank for number, rank in enumerate(ranks) if number != 2]
    assert [(rank.live.version, rank.live.phase) for rank in survivors] == [(1, Phase.PREPARING)] * 3
    texts = texts_of(ranks)
    assert all(expected[name][: len(tokens)] == tokens for name, tokens in texts.items())
    assert {len(tokens) for tokens in texts.values()} <= {dies_in - 1, dies_in}
    assert len(texts) == NUM_TEXTS


@pytest.mark.parametrize("shared_is_routed", [False, True])
def test_balancing_all_the_time_changes_no_token(folder: Path, expected: Texts, shared_is_routed: bool) -> None:
    ranks, _ = play(folder, UNITS["TP2 x DP2"], balanced=True, shared_is_routed=shared_is_routed)
    assert ranks[0].live.version > 1
    assert len({(rank.live.version, rank.live.placement.slots.tobytes()) for rank in ranks}) == 1
    assert texts_of(ranks) == expected
