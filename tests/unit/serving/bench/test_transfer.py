"""The pages that the ways of a transfer are measured on."""

from __future__ import annotations

from kvcache.transfer.base import runs
from serving.bench.shapes import SHAPES
from serving.bench.transfer import setups_of
from serving.model.config import ModelConfig


def test_scattered_pages_go_alone_and_adjacent_ones_together() -> None:
    setups = setups_of(ModelConfig.from_dict(SHAPES["lite"]), 4096, "cpu", 3, 0)
    pieces = {name: len(list(runs(setup.sources, setup.targets))) for name, setup in setups.items()}
    assert pieces["one piece"] == 1
    assert pieces["pages"] > 60
    assert pieces["planes"] > 1700
    assert {setup.num_bytes for setup in setups.values()} == {64 * 27 * 64 * 576 * 2}
