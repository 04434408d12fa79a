"""Which kernels a model runs on where there is more than one: the [kernels] table, settled once for a model and a device.

`auto` is ours at every shape (docs/PERFORMANCE.md): alone FlashMLA is at most 5 % faster and lets no launch overlap its own, and
DeepGEMM, faster from 64 rows on, compiles a kernel when a step of a new size comes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from serving.core.config import KernelsTable
from serving.core.errors import ConfigError
from serving.kernels.libraries import DeepGemm, FlashMla
from serving.model.config import ModelConfig
from serving.model.weight import keeps_fp8

# As vLLM's wheel ships them: the builds that were measured.
_FLASH_MLA = "vllm.third_party.flashmla.flash_mla_interface"
_DEEP_GEMM = "vllm.third_party.deep_gemm"

Load = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelChoices:
    """The library that computes in place of our kernel; None: ours does."""

    mla_decode: FlashMla | None = None
    linear_fp8: DeepGemm | None = None
    grouped_fp8: DeepGemm | None = None


OURS = KernelChoices()


def choose_kernels(
    table: KernelsTable,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    load: Load = importlib.import_module,
) -> KernelChoices:
    """`load`: a module by its name. Raises ConfigError if a library that `table` names does not load or does not take this model."""
    fp8 = keeps_fp8(config, dtype, device)
    return KernelChoices(
        mla_decode=_flash_mla(table.mla_decode, config, dtype, device, load),
        linear_fp8=_deep_gemm("linear_fp8", table.linear_fp8, fp8, load),
        grouped_fp8=_deep_gemm("grouped_fp8", table.grouped_fp8, fp8, load),
    )


def _flash_mla(
    wanted: str, config: ModelConfig, dtype: torch.dtype, device: torch.device, load: Load
) -> FlashMla | None:
    if wanted != "flashmla":
        return None
    widths = config.kv_lora_rank, config.qk_rope_head_dim
    if device.type != "cuda" or dtype != torch.bfloat16 or widths != (512, 64):
        raise ConfigError(
            f"kernels.mla_decode is flashmla, which attends bfloat16 rows of 512 + 64 on a GPU, not {dtype} rows of "
            f"{widths[0]} + {widths[1]} on {device.type}; set it to auto or baton"
        )
    try:
        return FlashMla(load(_FLASH_MLA))
    except Exception as error:
        raise _absent("mla_decode", wanted, error) from error


def _deep_gemm(key: str, wanted: str, fp8: bool, load: Load) -> DeepGemm | None:
    if wanted != "deepgemm":
        return None
    if not fp8:
        raise ConfigError(
            f"kernels.{key} is deepgemm, which multiplies FP8 weights in blocks of 128 x 128 on a GPU, and this model "
            "has none there; set it to auto or baton"
        )
    try:
        return DeepGemm(load(_DEEP_GEMM))
    except Exception as error:
        raise _absent(key, wanted, error) from error


def _absent(key: str, wanted: str, error: Exception) -> ConfigError:
    """Whatever a library's import may raise."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(
        f"kernels.{key} is {wanted}, which does not load ({reason}); install vLLM 0.24, whose wheel holds it, or set it "
        "to auto or baton"
    )
