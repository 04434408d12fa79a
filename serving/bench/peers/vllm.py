"""vLLM's offline engine, for `child.py`; on CPU and, with the same prompts, on a GPU machine.

Compiled as it comes (and with CUDA graphs on a GPU), no prefix cache, one process: what is measured is the engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # Both would compile for minutes before the first step of a GPU.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_DEEP_GEMM_WARMUP": "skip",
}


def load(
    *,
    model_dir: str,
    dtype: str,
    max_num_seqs: int,
    max_tokens: int,
    threads: int | None = None,
    enforce_eager: bool = False,
    load_format: str = "auto",
    gpu_memory_utilization: float | None = None,
) -> tuple[str, Callable[..., list[list[int]]]]:
    """`threads` binds CPU runs only. The variables are read when vLLM and its OpenMP are imported, hence not before."""
    os.environ.update(_ENVIRONMENT)
    if threads is not None:
        # Unbound like the other systems, which take turns on the same cores.
        os.environ.update(OMP_NUM_THREADS=str(threads), VLLM_CPU_OMP_THREADS_BIND="nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    limits: dict[str, Any] = {}
    if gpu_memory_utilization is not None:
        limits["gpu_memory_utilization"] = gpu_memory_utilization
    engine = vllm.LLM(
        model_dir,
        dtype=dtype,
        skip_tokenizer_init=True,
        load_format=load_format,
        max_num_seqs=max_num_seqs,
        max_model_len=max_tokens,
        enable_prefix_caching=False,
        enforce_eager=enforce_eager,
        seed=0,
        **limits,
    )

    def generate(prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return vllm.__version__, generate
