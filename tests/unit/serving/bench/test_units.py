"""Units of four virtual ranks: any sizes hand over to any others, and a wrong weight or latent shows in a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvcache.pool import KVPool
from serving.bench import units
from serving.bench.units import DTYPE, Unit, UnitSizes, generate, generate_alone
from serving.bench.virtual import run_units
from serving.core.errors import ConfigError
from serving.model.config import ModelConfig
from serving.model.units import UnitShape
from serving.parallel.balance import global_placement
from serving.parallel.groups import Groups
from tests.engine_factory import random_prompts
from tests.model_factory import make_checkpoint

NEW_TOKENS = 6
PROMPTS = random_prompts([1, 2, 63, 64, 65, 130, 7, 40], seed=3)
PLACEMENT = global_placement(np.ones((3, 8)), num_slots=12, num_gpus=4)


def sizes(tp: int, dp: int, ranks_per_node: int, *, by_nodes: bool = False, split_from: int = 0) -> UnitSizes:
    shape = UnitShape(
        groups=Groups(tp=tp, dp=dp, ep=4, ranks_per_node=ranks_per_node),
        heads=4 // tp,
        num_experts=8,
        active_slots=3,
        hosted_slots=3,
        shared_expert_routed=False,
    )
    return UnitSizes(shape=shape, placement=PLACEMENT, by_nodes=by_nodes, split_from=split_from)


TP2_DP2 = sizes(2, 2, 2, by_nodes=True)
DP4 = sizes(1, 4, 2)
TP4 = sizes(4, 1, 4, split_from=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, seed=5)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    return generate_alone(folder, PROMPTS, NEW_TOKENS)


def unit(folder: Path, sizes: UnitSizes) -> Unit:
    return Unit(folder, sizes, num_pages=32, max_num_seqs=len(PROMPTS))


@pytest.mark.parametrize(("prefill", "decode"), [(TP2_DP2, DP4), (DP4, TP2_DP2), (TP4, DP4), (TP2_DP2, TP4)])
def test_texts_are_those_of_one_rank_and_a_page_crosses_once(
    folder: Path, expected: list[list[int]], prefill: UnitSizes, decode: UnitSizes
) -> None:
    texts, latents = generate(unit(folder, prefill), unit(folder, decode), PROMPTS, NEW_TOKENS)
    assert texts == expected
    config = ModelConfig.from_folder(folder)
    num_rows = sum(map(len, PROMPTS)) * (config.num_layers + config.num_mtp_layers)
    assert latents.between_units == num_rows * config.latent_width * DTYPE.itemsize
    assert latents.inside_nodes == latents.between_units * (decode.groups.tp - 1)


def test_a_latent_that_changes_on_the_way_shows(
    folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []

    def copy(source: KVPool, source_page: int, target: KVPool, target_page: int) -> None:
        target.tensor[target_page].copy_(source.tensor[source_page])
        if not copied:
            target.tensor[target_page, 1, 0] += 3
        copied.append(target_page)

    monkeypatch.setattr(units, "_copy_page", copy)
    texts, _ = generate(unit(folder, TP2_DP2), unit(folder, DP4), PROMPTS, NEW_TOKENS)
    assert [text == wanted for text, wanted in zip(texts, expected, strict=True)].count(False) == 1


def test_units_whose_ranks_compute_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ep above 1"):
        run_units("laptop", tmp_path, num_requests=1, new_tokens=2, seed=0)


def test_an_expert_in_the_wrong_slot_shows(folder: Path, expected: list[list[int]]) -> None:
    class Misled(Unit):
        def _runner(self, world):  # type: ignore[no-untyped-def]
            runner = super()._runner(world)
            if world.rank == 2:
                slots = runner.model.expert_slots  # type: ignore[attr-defined]
                slots.write(0, 0, slots.read(0, 1))
            return runner

    decode = Misled(folder, DP4, num_pages=32, max_num_seqs=len(PROMPTS))
    texts, _ = generate(unit(folder, TP2_DP2), decode, PROMPTS, NEW_TOKENS)
    assert texts != expected
