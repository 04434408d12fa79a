"""Cases of products with one weight for all rows, and with one for each head."""

from __future__ import annotations

import torch
from torch import Tensor

from serving.bench.kernel_cases.stage import Call, Stage, Work, peer_library, product_work, sets_for
from serving.kernels.gemm import linear


def linear_fp8(stage: Stage, *, m: int, n: int, k: int, few: bool = False) -> Work:
    """`few`: rows so few that the weight's bytes are the bound."""
    num_bytes = n * k
    sets = range(sets_for(num_bytes))
    x, w = [stage.rows(m, k) for _ in sets], [stage.weight(n, k) for _ in sets]
    outs = [torch.empty(m, n, dtype=torch.bfloat16, device=stage.device) for _ in sets]
    peers: dict[str, Call] = {}
    library = peer_library("vllm.third_party.deep_gemm")
    if library is not None:

        def deep_gemm(i: int) -> Tensor:
            operands = (x[i].values, x[i].scales), (w[i].quantised, w[i].scales)
            library.fp8_gemm_nt(*operands, outs[i], disable_ue8m0_cast=True)
            return outs[i]

        peers["DeepGEMM"] = deep_gemm
    return product_work(
        lambda i: linear(x[i], w[i]), peers, len(sets), 2.0 * m * n * k, num_bytes if few else None, "fp8"
    )
