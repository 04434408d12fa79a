"""config.json as DeepSeek publishes it, as transformers 5 writes it, and everything else refused in one line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving.core.errors import ModelFolderError
from serving.model.config import ModelConfig
from tests.model_factory import TINY, YARN

# The fields of the published DeepSeek-V3 config.json that matter to inference.
PUBLISHED_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_the_published_file_gives_the_published_sizes() -> None:
    config = ModelConfig.from_dict(PUBLISHED_V3)
    assert config.latent_width == 576
    assert (config.num_layers, config.num_moe_layers, config.num_kv_layers) == (61, 58, 62)
    assert config.weight_block_size == (128, 128)
    assert config.yarn is not None
    assert config.yarn.attention_factor == 1.0
    mscale = 0.1 * math.log(40) + 1
    assert config.softmax_scale == pytest.approx(192**-0.5 * mscale**2)
    assert config.softmax_scale != pytest.approx(192**-0.5)


def test_both_spellings_of_rope_mean_the_same() -> None:
    newer = {key: value for key, value in PUBLISHED_V3.items() if key not in ("rope_scaling", "rope_theta")}
    scaling = {key: value for key, value in PUBLISHED_V3["rope_scaling"].items() if key != "type"}
    newer["rope_parameters"] = {**scaling, "rope_type": "yarn", "rope_theta": 10000.0}
    assert ModelConfig.from_dict(newer) == ModelConfig.from_dict(PUBLISHED_V3)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ],
)
def test_without_yarn_nothing_is_scaled(changes: dict[str, Any]) -> None:
    config = ModelConfig.from_dict({**PUBLISHED_V3, **changes})
    assert config.yarn is None
    assert config.softmax_scale == pytest.approx(192**-0.5)


def test_keys_that_transformers_leaves_out_take_its_defaults() -> None:
    dropped = ("topk_method", "scoring_func", "moe_layer_freq", "num_nextn_predict_layers", "quantization_config")
    config = ModelConfig.from_dict({key: value for key, value in PUBLISHED_V3.items() if key not in dropped})
    assert config.num_mtp_layers == 0
    assert config.weight_block_size is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": None, "model_type": "deepseek_v2"}, "deepseek_v2"),
        ({"scoring_func": "softmax"}, "softmax"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"n_group": 3}, "n_group"),
        ({"topk_group": 9}, "topk_group"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim"),
        ({"eos_token_id": "end"}, "eos_token_id"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelFolderError, match=named) as caught:
        ModelConfig.from_dict({**TINY, **changes})
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_readable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="not a folder"):
        ModelConfig.from_folder(tmp_path / "absent")
    with pytest.raises(ModelFolderError, match=r"config\.json is missing"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelFolderError, match="JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "rope_scaling": YARN}))
    assert ModelConfig.from_folder(tmp_path).vocab_size == 128


def test_reading_a_config_does_not_import_torch() -> None:
    code = "import sys, serving.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
