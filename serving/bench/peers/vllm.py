"""vLLM's offline engine, for `child.py`; on CPU and, with the same prompts, on a GPU machine.

Compiled as it comes (and with CUDA graphs on a GPU), no prefix cache, one process: what is measured is the engine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # Both would compile for minutes before the first step of a GPU.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_DEEP_GEMM_WARMUP": "skip",
}
# Its pages hold 16 to 64 tokens; one of them is nobody's.
_PAGE_TOKENS = 64
# Of a GPU that another system shares: what must be free at the start. The cache is sized below, whatever this says.
_MEMORY_FRACTION = 0.4


def load(
    *, model_dir: str, dtype: str, max_num_seqs: int, max_tokens: int, threads: int | None = None, **others: Any
) -> tuple[str, Callable[..., Any]]:
    """`threads` for the CPU, None on a GPU; `others` are arguments of vllm.LLM: enforce_eager, load_format and the like."""
    # Read when vLLM and its OpenMP are imported, hence not at the top of this file.
    os.environ.update(_ENVIRONMENT)
    if threads is not None:
        # Not bound to cores, like the other systems, which take turns on the same ones. The KMP settings are those that
        # vLLM makes where it binds: Intel's threads spin for 200 ms after their work otherwise, into the others' turns.
        os.environ.update(OMP_NUM_THREADS=str(threads), VLLM_CPU_OMP_THREADS_BIND="nobind")
        os.environ.update(KMP_BLOCKTIME="5", KMP_TPAUSE="0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    else:
        others = _on_gpu(Path(model_dir), max_num_seqs, max_tokens) | others
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
    steps = _Steps(engine)

    def generate(prompts: list[list[int]], num_new_tokens: int, timed: bool = False) -> Any:
        """`timed`: beside the texts, when each step ended, and with which step each text ended."""
        sampling = vllm.SamplingParams(temperature=0.0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False)
        steps.begin()
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        if not timed:
            return token_ids
        last_steps = [steps.last[output.request_id] for output in outputs]
        return {"token_ids": token_ids, "steps_s": steps.ended_s, "last_steps": last_steps}

    return vllm.__version__, generate


class _Steps:
    """Watches the steps that `engine.generate` runs. `ended_s`: from `begin` on; `last`: step of each text's last token."""

    def __init__(self, engine: Any) -> None:
        self.begin()
        core = engine.llm_engine
        run = core.step

        def step() -> Any:
            outputs = run()
            self.ended_s.append(time.perf_counter() - self._begin_s)
            self.last |= {output.request_id: len(self.ended_s) - 1 for output in outputs if output.finished}
            return outputs

        core.step = step

    def begin(self) -> None:
        self.ended_s: list[float] = []
        self.last: dict[str, int] = {}
        self._begin_s = time.perf_counter()


def _on_gpu(model_dir: Path, max_num_seqs: int, max_tokens: int) -> dict[str, Any]:
    """A cache for every sequence at its longest, as the other systems have; graphs of the batches between powers of two."""
    config = json.loads((model_dir / "config.json").read_text())
    token_bytes = 2 * config["num_hidden_layers"] * (config["kv_lora_rank"] + config["qk_rope_head_dim"])
    num_pages = max_num_seqs * -(-max_tokens // _PAGE_TOKENS) + max_num_seqs
    sizes = {1 << n for n in range(max_num_seqs.bit_length())} | {max_num_seqs}
    return {
        "kv_cache_memory_bytes": num_pages * _PAGE_TOKENS * token_bytes,
        "gpu_memory_utilization": _MEMORY_FRACTION,
        "cudagraph_capture_sizes": sorted(sizes),
    }
