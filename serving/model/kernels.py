"""Which kernels a model runs on where there is more than one: the [kernels] table, settled once for a model and a device.

`auto` is what makes whole steps shortest, shape by shape, measured on an H200 (docs/PERFORMANCE.md): DeepGEMM for dense FP8 products
of 64 rows and more, where it is installed and can compile; all else is ours. FlashMLA alone is up to 5 % faster at some shapes, but lets no
launch overlap its own; experts by DeepGEMM want rows in tiles of 128 and SiLU-mul as a pass of its own.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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
# Below, weights' bytes are the bound, and our kernel has them on their way before the rows are there.
_FEWEST_ROWS = 64

_LOG = logging.getLogger("baton.kernels")

Load = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelChoices:
    """The library that computes in place of our kernel; None: ours does."""

    mla_decode: FlashMla | None = None
    linear_fp8: DeepGemm | None = None
    grouped_fp8: DeepGemm | None = None

    def names(self) -> dict[str, str]:
        """By key of the table, what computes."""
        return {
            "mla_decode": "flashmla" if self.mla_decode else "baton",
            "linear_fp8": "deepgemm" if self.linear_fp8 else "baton",
            "grouped_fp8": "deepgemm" if self.grouped_fp8 else "baton",
        }

    def stop_compiling(self) -> None:
        """Steps of every size that is warmed up have run: no request is to wait for a library's compiler."""
        for library in (self.linear_fp8, self.grouped_fp8):
            if library is not None:
                library.stop_compiling()


OURS = KernelChoices()


def choose_kernels(
    table: KernelsTable,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tp: int = 1,
    load: Load = importlib.import_module,
) -> KernelChoices:
    """`tp`: ranks that share a layer. `load`: a module by its name. Raises ConfigError if a library that `table` names does not load or does not take this model; one that
    `auto` would take and cannot is done without."""
    fp8_on = device if keeps_fp8(config, dtype, device, tp) else None
    linear_fp8: DeepGemm | None = None
    if table.linear_fp8 != "auto":
        linear_fp8 = _deep_gemm("linear_fp8", table.linear_fp8, fp8_on, load)
    elif fp8_on is not None:
        linear_fp8 = _deep_gemm_if_it_can(fp8_on, load)
    return KernelChoices(
        mla_decode=_flash_mla(table.mla_decode, config, dtype, device, load),
        linear_fp8=linear_fp8,
        grouped_fp8=_deep_gemm("grouped_fp8", table.grouped_fp8, fp8_on, load),
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


def _deep_gemm(key: str, wanted: str, fp8_on: torch.device | None, load: Load) -> DeepGemm | None:
    if wanted != "deepgemm":
        return None
    if fp8_on is None:
        raise ConfigError(
            f"kernels.{key} is deepgemm, which multiplies FP8 weights in blocks of 128 x 128 on a GPU, and this model "
            "has none there; set it to auto or baton"
        )
    try:
        return _load_deep_gemm(fp8_on, load)
    except Exception as error:
        raise _absent(key, wanted, error) from error


def _deep_gemm_if_it_can(device: torch.device, load: Load) -> DeepGemm | None:
    try:
        return _load_deep_gemm(device, load, fewest_rows=_FEWEST_ROWS)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("vllm"):
            _LOG.warning("DeepGEMM does not load (%s); our kernels multiply", _reason(error))
    except Exception as error:
        _LOG.warning("DeepGEMM is installed and cannot be used (%s); our kernels multiply", _reason(error))
    return None


def _load_deep_gemm(device: torch.device, load: Load, *, fewest_rows: int = 1) -> DeepGemm:
    library = DeepGemm(load(_DEEP_GEMM), fewest_rows=fewest_rows)
    if not _has_nvcc():
        raise FileNotFoundError("it compiles its kernels with nvcc, and there is none where CUDA_HOME or PATH point")
    if torch.cuda.is_available():
        library.try_out(device)
    return library


def _has_nvcc() -> bool:
    """Where the library looks for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return (Path(home) / "bin" / "nvcc").is_file()
    return shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").is_file()


def _absent(key: str, wanted: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"kernels.{key} is {wanted}, which does not load ({_reason(error)}); install vLLM 0.24, whose wheel holds it, or "
        "set it to auto or baton"
    )


def _reason(error: Exception) -> str:
    """Whatever a library's import may raise, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
