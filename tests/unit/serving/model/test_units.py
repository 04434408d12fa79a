"""Sizes that fit a model, and one line with the fix for each that does not."""

from __future__ import annotations

import pytest

from serving.core.config import load_config
from serving.core.errors import ConfigError
from serving.model.published import DEEPSEEK_V3
from serving.model.units import UnitShape, groups_of, shape_of


def decode(*keys: str) -> UnitShape:
    return shape_of(load_config(overrides=[f"decode.{key}" for key in keys]).decode, DEEPSEEK_V3)


def prefill(*keys: str) -> UnitShape:
    return shape_of(load_config(overrides=[f"prefill.{key}" for key in keys]).prefill, DEEPSEEK_V3)


def test_one_rank_has_every_head_and_every_expert():
    shape = decode()
    assert (shape.heads, shape.num_experts, shape.active_slots, shape.hosted_slots) == (128, 256, 256, 256)
    assert shape.groups.world_size == 1


def test_the_papers_prefill_unit_has_nine_of_288_experts_a_gpu():
    shape = prefill("tp=4", "dp=8", "ep=32", "redundant_experts=32")
    assert (shape.heads, shape.active_slots, shape.num_slots, shape.groups.num_nodes) == (32, 9, 288, 4)


def test_the_papers_decode_unit_has_one_of_320_and_a_routed_shared_expert():
    shape = decode("tp=4", "dp=80", "ep=320", "redundant_experts=64", "shared_expert_routed=true")
    assert (shape.num_experts, shape.active_slots, shape.num_slots, shape.groups.num_nodes) == (257, 1, 320, 40)


def test_hosted_slots_are_in_memory_beside_those_in_use():
    shape = prefill("tp=4", "dp=8", "redundant_experts=32", "hosted_slots=16")
    assert (shape.active_slots, shape.hosted_slots) == (9, 16)


def test_ep_is_the_whole_unit_unless_it_is_given():
    assert groups_of(load_config(overrides=["decode.tp=2", "decode.dp=4"]).decode).ep == 8
    assert groups_of(load_config(overrides=["decode.dp=4", "decode.ep=1"]).decode).ep == 1


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["tp=3"], "tp = 3 does not divide the model's 128 attention heads"),
        (["tp=3", "dp=8"], "tp = 3 does not divide the 8 ranks of a node, .* choose tp among 1, 2, 4, 8"),
        (
            ["tp=256", "ranks_per_node=256"],
            "tp = 256 does not divide the model's 128 attention heads; choose a divisor of 128",
        ),
        (["dp=12"], "choose dp so that tp \\* dp is a multiple of 8"),
        (["dp=8", "ep=3"], "ep = 3 does not divide the 8 ranks"),
        (["dp=24", "ep=24"], "redundant_experts = 0: .* do not divide over ep = 24 ranks; set redundant_experts to 8"),
        (["dp=32", "redundant_experts=33"], "set redundant_experts to 32 or 64"),
        (["dp=320", "tp=1"], "set redundant_experts to 64"),
        (["redundant_experts=1"], "redundant_experts = 1 gives a rank 257 slots for 256 experts, .* up to 0"),
        (
            ["dp=8", "hosted_slots=32"],
            "hosted_slots = 32 leaves no choice .* uses 32 a rank .*; choose 33 to 256, or 0",
        ),
        (["hosted_slots=256"], "hosted_slots = 256 leaves no choice .* uses 256 a rank .*; set it to 0, or raise ep"),
        (["dp=8", "hosted_slots=257"], "hosted_slots = 257 gives a rank 257 slots .* choose hosted_slots up to 256"),
        (["kv_sharding=true"], "set tp above 1, or kv_sharding to false"),
        (
            ["dp=16", "dispatch=symmetric"],
            "dispatch = symmetric .* ep = 16 ranks are on several of 8; set dispatch to auto, or ep to 8 at most",
        ),
        (["dp=8", "shared_expert_routed=true"], "redundant_experts = 0; set it to 1 or more"),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_key_and_the_fix(keys: list[str], expected: str):
    with pytest.raises(ConfigError, match=expected) as caught:
        decode(*keys)
    assert str(caught.value).startswith("[decode] ")
    assert "\n" not in str(caught.value)


def test_the_table_that_is_wrong_is_named():
    with pytest.raises(ConfigError, match=r"^\[prefill\] tp"):
        prefill("tp=3", "ranks_per_node=3")


def test_deepep_is_for_gpus_of_one_node():
    assert prefill("dp=8", "dispatch=deepep").groups.num_nodes == 1
    prefill("dp=32", "ep=8", "dispatch=deepep")
    with pytest.raises(
        ConfigError, match=r"^\[prefill\] dispatch = deepep .* ep = 16 ranks .* set dispatch to auto, or ep to 8"
    ):
        prefill("dp=16", "dispatch=deepep")


def test_a_shared_expert_of_another_width_cannot_be_routed():
    from dataclasses import replace

    table = load_config(
        overrides=["decode.dp=8", "decode.redundant_experts=8", "decode.shared_expert_routed=true"]
    ).decode
    assert shape_of(table, DEEPSEEK_V3).num_experts == 257
    with pytest.raises(ConfigError, match="as wide as a routed one"):
        shape_of(table, replace(DEEPSEEK_V3, num_shared_experts=2))
