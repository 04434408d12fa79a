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
    *, model_dir: str, dtype: str, max_num_seqs: int, max_tokens: int, threads: int | None = None, **others: Any
) -> tuple[str, Callable[..., list[list[int]]]]:
    """`threads` for the CPU, None on a GPU; `others` are arguments of vllm.LLM: enforce_eager, load_format and the like."""
    # Read when vLLM and its OpenMP are imported, hence not at the top of this file.
    os.environ.update(_ENVIRONMENT)
    if threads is not None:
        # Not bound to cores, like the other systems, which take turns on the same ones. The KMP settings are those that
        # vLLM makes where it binds: Intel's threads spin for 200 ms after their work otherwise, into the others' turns.
        os.environ.update(OMP_NUM_THREADS=str(threads), VLLM_CPU_OMP_THREADS_BIND="nobind")
        os.environ.update(KMP_BLOCKTIME="5", KMP_TPAUSE="0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    engine = vllm.LLM(
        model_dir,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_num_seqs=max_num_seqs,
        max_model_len=max_tokens,
        enable_prefix_caching=False,
        seed=0,
        **others,
    )

    def generate(prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return vllm.__version__, generate
