"""The name table against the published checkpoints of V3, R1 and V3.1, at full size on the meta device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.names import SCALE_SUFFIX, name_table
from tests.model_factory import FP8_BLOCK, checkpoint_shapes, is_quantised
from tests.unit.serving.model.test_config import PUBLISHED_V3

# Tensors in the published index, and bytes of the 163 published files, headers included.
NUM_PUBLISHED_TENSORS = 91_991
NUM_PUBLISHED_BYTES = 688_586_727_753

V31_QUANTIZATION = {**PUBLISHED_V3["quantization_config"], "scale_fmt": "ue8m0"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "V3": PUBLISHED_V3,
    "R1": {**PUBLISHED_V3, "transformers_version": "4.46.3"},
    "V3.1": {**PUBLISHED_V3, "quantization_config": V31_QUANTIZATION},
}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Every name of the published index, scales among them, from the tests' own description of the format."""
    shapes = checkpoint_shapes(PUBLISHED_V3)
    scales = {
        name + "_scale_inv": tuple(-(-length // FP8_BLOCK) for length in shape)
        for name, shape in shapes.items()
        if is_quantised(name)
    }
    return shapes | scales


def test_the_description_has_the_published_count_and_size() -> None:
    shapes = published_shapes()
    assert len(shapes) == NUM_PUBLISHED_TENSORS
    num_bytes = 0
    for name, shape in shapes.items():
        width = 1 if is_quantised(name) else 4 if name.endswith(("_scale_inv", "correction_bias")) else 2
        num_bytes += width * math.prod(shape)
    header_bytes_a_tensor = (NUM_PUBLISHED_BYTES - num_bytes) / NUM_PUBLISHED_TENSORS
    assert 100 < header_bytes_a_tensor < 160


@pytest.mark.parametrize("release", PUBLISHED)
def test_the_table_names_exactly_the_published_tensors_with_their_shapes(release: str) -> None:
    model = DeepseekV3(ModelConfig.from_dict(PUBLISHED[release]), torch.bfloat16, "meta")
    table = name_table(model)
    ours = {name: tuple(target.into.shape) for name, target in table.items()}
    for name, target in table.items():
        if is_quantised(name):
            assert target.quantised, name
            rows, columns = ours[name]
            ours[name + SCALE_SUFFIX] = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    assert ours == published_shapes()


def test_every_parameter_is_filled_once_and_whole() -> None:
    config = ModelConfig.from_dict({**PUBLISHED_V3, "num_hidden_layers": 4, "n_routed_experts": 16})
    table = name_table(DeepseekV3(config, torch.bfloat16, "meta"))
    own = [target.into for target in table.values() if target.repeats is None]
    filled = sum(view.numel() for view in own)
    places = {(id(view.untyped_storage()), view.storage_offset(), view.shape) for view in own}
    storages = {id(view.untyped_storage()): view.untyped_storage().nbytes() // view.element_size() for view in own}
    assert len(places) == len(own)
    assert filled == sum(storages.values())


def test_the_last_layer_is_left_out_without_mtp() -> None:
    config = ModelConfig.from_dict({**PUBLISHED_V3, "num_nextn_predict_layers": 0})
    table = name_table(DeepseekV3(config, torch.bfloat16, "meta"))
    assert not any(name.startswith("model.layers.61.") for name in table)
    assert any(name.startswith("model.layers.60.") for name in table)
