"""After warm-up no request waits for a compiler."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import triton

from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.core.request import SamplingParams
from serving.engine.build import build_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

DEMO = Path(__file__).parents[2] / "serving" / "demo" / "model"


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the kernels that were made meanwhile, or read from the cache on disk, which no fresh machine has."""
    seen: list[str] = []

    def note(*, src: Any, **_: Any) -> None:
        seen.append(f"{src.name} {src.signature} {src.constants}")

    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = note
    try:
        yield seen
    finally:
        triton.knobs.compilation.listener = before


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_request_compiles(dtype: str) -> None:
    engine = build_engine(DEMO, max_num_seqs=8, num_pages=256, dtype=dtype, device="cuda")
    with compilations() as seen:
        engine.runner.warm_up(max_batched_tokens=512, decodes=True)
    assert seen, "the hook hears nothing"
    loop = Aggregated(
        engine.runner,
        KVManager(engine.pool.num_pages, prefix_cache=True),
        num_slots=engine.max_num_seqs,
        max_batched_tokens=512,
        max_model_len=engine.max_model_len,
        run_ahead=True,
    )
    rng = random.Random(0)
    common = [rng.randrange(2, 256) for _ in range(640)]
    lengths = [1, 2, 3, 17, 63, 64, 100, 129, 200, 255, 333, 500]
    prompts = [[rng.randrange(2, 256) for _ in range(length)] for length in lengths]
    asked = SamplingParams(temperature=0.0)
    with compilations() as seen:
        loop.generate(prompts, asked, 8)
        # A part of the context cached, and odd numbers of tokens behind it.
        for length in (64, 128, 320, 640):
            loop.generate([common[:length] + prompt for prompt in prompts[:10]], asked, 2)
    assert not seen, "\n".join(seen)
