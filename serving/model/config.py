"""What `config.json` of a DeepSeek-V3-architecture model says, checked.

Reads the file as DeepSeek publishes it (`rope_scaling`) and as transformers >= 5 writes it (`rope_parameters`). Whatever
this model cannot compute exactly is refused here, in one line, before a byte of weights is read. Must not import torch:
the router, the page layout and the cost formulas read it too.

Width names follow REFERENCE section 1: hidden D, heads H, latent C = `kv_lora_rank`, rope R = `qk_rope_head_dim`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from serving.core.errors import ModelFolderError

_ARCHITECTURE = "DeepseekV3ForCausalLM"

# Where the file leaves a key out, transformers' DeepseekV3Config assumes these; anything else must be in the file.
_FIXED: tuple[tuple[str, object], ...] = (
    ("scoring_func", "sigmoid"),
    ("topk_method", "noaux_tc"),
    ("hidden_act", "silu"),
    ("attention_bias", False),
    ("tie_word_embeddings", False),
    ("rope_interleave", True),
    ("moe_layer_freq", 1),
)


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Rotary scaling for long contexts (YaRN). `attention_factor` multiplies cos and sin; 1 in every published model."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of one model; every one a field of `config.json`.

    `q_lora_rank` None means one plain `q_proj`. `weight_block_size` is (rows, columns) of an FP8 scale block, None where
    the folder holds no FP8 weights. `num_mtp_layers` is 0 or 1.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_layers: int
    num_dense_layers: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    num_routed_experts: int
    num_shared_experts: int
    num_experts_per_token: int
    num_groups: int
    num_groups_kept: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    rms_norm_eps: float
    rope_theta: float
    yarn: YarnConfig | None
    max_position_embeddings: int
    num_mtp_layers: int
    weight_block_size: tuple[int, int] | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `folder/config.json`. Raises ModelFolderError."""
        path = Path(folder) / "config.json"
        if not Path(folder).is_dir():
            raise ModelFolderError(
                f"{folder} is not a folder; give the folder that holds config.json and *.safetensors"
            )
        if not path.is_file():
            raise ModelFolderError(f"{path} is missing; give the folder that holds config.json and *.safetensors")
        try:
            fields = json.loads(path.read_bytes())
        except (ValueError, OSError) as error:
            raise ModelFolderError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
        if not isinstance(fields, dict):
            raise ModelFolderError(f"{path} holds no JSON object; fetch it again")
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> ModelConfig:
        """Check the parsed `config.json`. Raises ModelFolderError that names the key and what is supported."""
        _refuse_other_architectures(fields)
        read = _Reader(fields)
        num_layers = read.count("num_hidden_layers")
        q_lora_rank = None if read.value("q_lora_rank", None) is None else read.count("q_lora_rank")
        config = cls(
            vocab_size=read.count("vocab_size"),
            hidden_size=read.count("hidden_size"),
            intermediate_size=read.count("intermediate_size"),
            moe_intermediate_size=read.count("moe_intermediate_size"),
            num_layers=num_layers,
            num_dense_layers=min(read.count("first_k_dense_replace", least=0), num_layers),
            num_heads=read.count("num_attention_heads"),
            q_lora_rank=q_lora_rank,
            kv_lora_rank=read.count("kv_lora_rank"),
            qk_nope_head_dim=read.count("qk_nope_head_dim"),
            qk_rope_head_dim=read.count("qk_rope_head_dim"),
            v_head_dim=read.count("v_head_dim"),
            num_routed_experts=read.count("n_routed_experts"),
            num_shared_experts=read.count("n_shared_experts"),
            num_experts_per_token=read.count("num_experts_per_tok"),
            num_groups=read.count("n_group", default=1),
            num_groups_kept=read.count("topk_group", default=1),
            routed_scaling_factor=read.number("routed_scaling_factor", default=1.0),
            norm_topk_prob=bool(read.value("norm_topk_prob", True)),
            rms_norm_eps=read.number("rms_norm_eps", default=1e-6),
            rope_theta=_rope_theta(fields),
            yarn=_yarn(fields),
            max_position_embeddings=read.count("max_position_embeddings"),
            num_mtp_layers=_num_mtp_layers(read),
            weight_block_size=_weight_block_size(fields.get("quantization_config")),
            bos_token_id=next(iter(_token_ids(fields.get("bos_token_id"), "bos_token_id")), None),
            eos_token_ids=_token_ids(fields.get("eos_token_id"), "eos_token_id"),
        )
        config._check()
        return config

    def _check(self) -> None:
        if self.qk_rope_head_dim % 2:
            raise ModelFolderError(f"config.json: qk_rope_head_dim {self.qk_rope_head_dim} is odd; rope turns pairs")
        if self.num_routed_experts % self.num_groups or self.experts_per_group < 2:
            raise ModelFolderError(
                f"config.json: {self.num_routed_experts} experts in n_group {self.num_groups}; "
                "groups must be equal and hold at least 2 experts"
            )
        if self.num_groups_kept > self.num_groups:
            raise ModelFolderError(f"config.json: topk_group {self.num_groups_kept} is above n_group {self.num_groups}")
        if self.num_experts_per_token > self.num_groups_kept * self.experts_per_group:
            raise ModelFolderError(
                f"config.json: num_experts_per_tok {self.num_experts_per_token} is above the "
                f"{self.num_groups_kept * self.experts_per_group} experts of topk_group {self.num_groups_kept}"
            )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Values cached per token and layer: [c_t ; k^R_t]."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model; the MTP layer is one more."""
        return self.num_layers - self.num_dense_layers

    @property
    def num_kv_layers(self) -> int:
        """Layers of a KV page: the main model's, then the MTP layer."""
        return self.num_layers + self.num_mtp_layers

    @property
    def experts_per_group(self) -> int:
        return self.num_routed_experts // self.num_groups

    @property
    def shared_intermediate_size(self) -> int:
        """All shared experts of a layer are stored, and computed, as one MLP."""
        return self.num_shared_experts * self.moe_intermediate_size

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times mscale^2 under YaRN, mscale = 0.1 * mscale_all_dim * ln(factor) + 1."""
        scale = float(self.qk_head_dim**-0.5)
        if self.yarn is None:
            return scale
        return scale * yarn_mscale(self.yarn.factor, self.yarn.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
    """Attention temperature of YaRN: 0.1 * mscale * ln(factor) + 1 above factor 1."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


class _Reader:
    """Typed access to the parsed file; a fault names the key."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        self.fields = fields

    def value(self, key: str, default: object) -> object:
        return self.fields.get(key, default)

    def count(self, key: str, *, default: int | None = None, least: int = 1) -> int:
        value = self.fields.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ModelFolderError(f"config.json: {key} is {value!r}; needed is an integer of at least {least}")
        return value

    def number(self, key: str, *, default: float) -> float:
        return _number(self.fields.get(key, default), key)


def _number(value: object, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelFolderError(f"config.json: {key} is {value!r}; needed is a number")
    return float(value)


def _refuse_other_architectures(fields: Mapping[str, object]) -> None:
    named = fields.get("architectures")
    known = named == [_ARCHITECTURE] if named else fields.get("model_type") == "deepseek_v3"
    if not known:
        shown = named[0] if isinstance(named, list) and named else fields.get("model_type")
        raise ModelFolderError(
            f"config.json: architecture {shown!r} is not supported; supported is {_ARCHITECTURE} "
            "(DeepSeek-V3, R1, V3.1 and smaller models of the same architecture)"
        )
    for key, supported in _FIXED:
        value = fields.get(key, supported)
        if value is not None and value != supported:
            raise ModelFolderError(f"config.json: {key} {value!r} is not supported; supported is {supported!r}")


def _rope_fields(fields: Mapping[str, object]) -> Mapping[str, object]:
    for key in ("rope_parameters", "rope_scaling"):
        value = fields.get(key)
        if value is not None:
            if not isinstance(value, dict):
                raise ModelFolderError(f"config.json: {key} is {value!r}; needed is an object or null")
            return value
    return {}


def _rope_theta(fields: Mapping[str, object]) -> float:
    theta = _rope_fields(fields).get("rope_theta", fields.get("rope_theta", 10000.0))
    return _number(theta, "rope_theta")


def _yarn(fields: Mapping[str, object]) -> YarnConfig | None:
    rope = _rope_fields(fields)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ModelFolderError(f"config.json: rope type {kind!r} is not supported; supported are 'yarn' and none")
    original = rope.get("original_max_position_embeddings")
    if not isinstance(original, int):
        raise ModelFolderError("config.json: YaRN needs original_max_position_embeddings, an integer")
    factor = _number(rope.get("factor"), "factor")
    mscale = _number(rope.get("mscale") or 0, "mscale")
    mscale_all_dim = _number(rope.get("mscale_all_dim") or 0, "mscale_all_dim")
    both = bool(mscale and mscale_all_dim)
    implied = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim) if both else yarn_mscale(factor, 1.0)
    given = rope.get("attention_factor")
    return YarnConfig(
        factor=factor,
        original_max_positions=original,
        beta_fast=_number(rope.get("beta_fast") or 32, "beta_fast"),
        beta_slow=_number(rope.get("beta_slow") or 1, "beta_slow"),
        mscale_all_dim=mscale_all_dim,
        attention_factor=implied if given is None else _number(given, "attention_factor"),
    )


def _num_mtp_layers(read: _Reader) -> int:
    num_layers = read.count("num_nextn_predict_layers", default=0, least=0)
    if num_layers > 1:
        raise ModelFolderError(
            f"config.json: num_nextn_predict_layers {num_layers} is not supported; supported are 0 and 1"
        )
    return num_layers


def _weight_block_size(quantization: object) -> tuple[int, int] | None:
    if quantization is None:
        return None
    supported = 'supported is {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [rows, columns]} or none'
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        raise ModelFolderError(f"config.json: quantization_config {quantization!r} is not supported; {supported}")
    block = quantization.get("weight_block_size")
    if quantization.get("fmt", "e4m3") == "e4m3" and isinstance(block, list) and len(block) == 2:
        rows, columns = block
        if isinstance(rows, int) and isinstance(columns, int) and min(rows, columns) > 0:
            return rows, columns
    raise ModelFolderError(f"config.json: quantization_config {quantization!r} is not supported; {supported}")


def _token_ids(value: object, key: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ModelFolderError(f"config.json: {key} is {value!r}; needed is a token id or a list of them")
    return tuple(ids)
