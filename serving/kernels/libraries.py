"""FlashMLA and DeepGEMM in place of our kernels, called by our conventions. Neither is ever required.

Each is made of the library's module and raises AttributeError if that is another version than is called here.
`serving.model.kernels` says which model uses which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from serving.kernels.quant import (
    Fp8Weight,
    QuantisedRows,
    dequantise_block_fp8,
    quantise_block_fp8,
    quantise_rows_fp8,
)

if TYPE_CHECKING:
    from serving.kernels.triton.gemm import Tiles

# Of the library's kernels on sm_90, at least.
_BLOCK_N, _BLOCK_K = 64, 128
# Of a product rounded to bf16, beside one that is not.
_MOST_ERROR = 0.01


class FlashMla:
    """Attention of decode steps over bf16 rows of 512 latents and 64 rope values.

    A schedule of `new_schedule` is for one step: the first `decode` fills it on the device, from the lengths, and the layers
    after it read it. A captured step therefore makes its schedule at each replay, and nothing is read back.
    """

    def __init__(self, module: Any) -> None:
        self.new_schedule = module.FlashMLASchedMeta
        self._attend = module.flash_mla_with_kvcache

    def decode(
        self,
        q_BTHW: Tensor,
        rows_PTW: Tensor,
        page_table_BP: Tensor,
        context_lens_B: Tensor,
        schedule: Any,
        *,
        latent: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Out [B, T, H, C] and lse fp32 [B, T, H], as `triton.mla_decode.decode_paged` from position 0.

        Page and row strides of `rows_PTW` are the pool's. Each length is at least T: of no rows the lse would be +inf.
        """
        # Its kernels are launched early and do not wait for the one before, which must not let them start early then; and its
        # last one may end before the attention has, where there is nothing to merge. An ordinary launch between ours and them
        # waits for all before it, and lets nobody start early.
        torch.ones(1, device=q_BTHW.device)
        out, lse_BHT = self._attend(
            q_BTHW, rows_PTW.unsqueeze(2), page_table_BP, context_lens_B, latent, schedule,
            softmax_scale=scale, causal=True,
        )  # fmt: skip
        torch.ones(1, device=out.device)
        return out, lse_BHT.transpose(1, 2)


class DeepGemm:
    """FP8 products, bf16 results. Scales are read as `QuantisedRows` and `Fp8Weight` have them, nothing is converted.

    nvcc compiles a kernel, for seconds, when a weight's shape meets a number of rows that is cut in a new way. So a number of
    rows that no step had before `stop_compiling` is not taken afterwards. `fewest_rows`: nor are fewer. Nor are weights that are not
    cut into whole blocks.
    """

    ROWS_OF_AN_EXPERT = 128
    """In a grouped product so many rows that follow each other have one expert."""

    def __init__(self, module: Any, *, fewest_rows: int = 1) -> None:
        self._product = module.fp8_gemm_nt
        self._grouped = module.m_grouped_fp8_gemm_nt_contiguous
        self._fewest_rows = fewest_rows
        self._met: set[tuple[int, torch.Size]] = set()
        self._compiles = True

    def try_out(self, device: torch.device) -> None:
        """Raises whatever its compiler does, and RuntimeError if the product is not ours: another version may want other scales."""
        generator = torch.Generator(device).manual_seed(0)
        x, w = torch.randn(2, 128, 256, generator=generator, device=device)
        # Scales that differ from block to block and from row to row.
        x *= torch.linspace(1, 8, 128, device=device)[:, None]
        w[:, :128] *= 4
        x_MK, (values, scales) = quantise_rows_fp8(x), quantise_block_fp8(w, (128, 128))
        w_NK = Fp8Weight(quantised=values, scales=scales)
        want = x_MK.dequantise(torch.float32) @ dequantise_block_fp8(values, scales, (128, 128), torch.float32).T
        error = float((self.linear(x_MK, w_NK) - want).norm() / want.norm())
        if not error < _MOST_ERROR:
            raise RuntimeError(f"its product of a small matrix is off by {error:.3f} of its size")

    def takes(self, num_rows: int, shape: torch.Size) -> bool:
        """Whether it multiplies so many rows by a weight of `shape`."""
        whole = shape[-1] % _BLOCK_K == 0 and shape[-2] % _BLOCK_N == 0
        return whole and num_rows >= self._fewest_rows and (self._compiles or (num_rows, shape) in self._met)

    def stop_compiling(self) -> None:
        """Once the steps that are warmed up have run."""
        self._compiles = False

    def linear(self, x_MK: QuantisedRows, w_NK: Fp8Weight) -> Tensor:
        """x W^T, [M, N]."""
        self._met.add((x_MK.values.shape[0], w_NK.shape))
        out = torch.empty(x_MK.values.shape[0], w_NK.shape[0], dtype=torch.bfloat16, device=x_MK.values.device)
        self._product((x_MK.values, x_MK.scales), (w_NK.quantised, w_NK.scales), out, disable_ue8m0_cast=True)
        return out

    def grouped(self, x_SK: QuantisedRows, w_ENK: Fp8Weight, expert_S: Tensor) -> Tensor:
        """[S, N], each row times the matrix of its expert (`expert_of_rows`); rows of no expert are left undefined."""
        self._met.add((x_SK.values.shape[0], w_ENK.shape))
        out = torch.empty(x_SK.values.shape[0], w_ENK.shape[1], dtype=torch.bfloat16, device=x_SK.values.device)
        operands = (x_SK.values, x_SK.scales), (w_ENK.quantised, w_ENK.scales)
        self._grouped(*operands, out, expert_S, disable_ue8m0_cast=True)
        return out


def expert_of_rows(tiles: Tiles) -> Tensor:
    """int32 [max_tiles * num_rows]: the expert of each row, -1 behind the tiles in use."""
    used = torch.arange(tiles.max_tiles, device=tiles.expert.device) < tiles.num_used
    return torch.where(used, tiles.expert, -1).repeat_interleave(tiles.num_rows)
