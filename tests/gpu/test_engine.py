"""The engine on a GPU: captured steps say what the CPU says."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.core.request import SamplingParams
from serving.engine.build import Engine, build_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

DEMO = Path(__file__).parents[2] / "serving" / "demo" / "model"
GREEDY = SamplingParams(temperature=0.0)
NEW_TOKENS = 24


def engine_on(device: str, dtype: str = "float32") -> Engine:
    engine = build_engine(DEMO, max_num_seqs=16, num_pages=512, dtype=dtype, device=device)
    engine.runner.warm_up(max_batched_tokens=256, decodes=True)
    engine.pool.poison_all()
    return engine


def loop_over(engine: Engine, *, max_batched_tokens: int = 256, run_ahead: bool = True) -> Aggregated:
    return Aggregated(
        engine.runner,
        KVManager(engine.pool.num_pages, prefix_cache=False, on_free=engine.pool.poison),
        num_slots=engine.max_num_seqs,
        max_batched_tokens=max_batched_tokens,
        max_model_len=engine.max_model_len,
        run_ahead=run_ahead,
    )


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    lengths = [1, 5, 63, 64, 65, 128, 200, 300, 700]
    return [[rng.randrange(2, 256) for _ in range(rng.choice(lengths))] for _ in range(200)]


@pytest.fixture(scope="module")
def texts(prompts: list[list[int]]) -> list[list[int]]:
    return loop_over(engine_on("cpu")).generate(prompts, GREEDY, NEW_TOKENS)


@pytest.mark.parametrize(("max_batched_tokens", "run_ahead"), [(256, True), (64, False), (4096, True)])
def test_greedy_text_in_fp32_is_the_cpus(
    prompts: list[list[int]], texts: list[list[int]], max_batched_tokens: int, run_ahead: bool
) -> None:
    loop = loop_over(engine_on("cuda"), max_batched_tokens=max_batched_tokens, run_ahead=run_ahead)
    assert loop.generate(prompts, GREEDY, NEW_TOKENS) == texts


def test_a_latent_that_is_off_shows(prompts: list[list[int]], texts: list[list[int]]) -> None:
    engine = engine_on("cuda")
    engine.runner.model.blocks[3].attention.kv_norm[5] *= 1.5  # type: ignore[attr-defined]
    assert loop_over(engine).generate(prompts, GREEDY, NEW_TOKENS) != texts


def test_drawn_text_does_not_depend_on_the_batch(prompts: list[list[int]]) -> None:
    engine = engine_on("cuda")
    asked = [SamplingParams(temperature=0.8, seed=i, top_p=0.9) if i % 3 else GREEDY for i in range(len(prompts))]
    together = loop_over(engine).generate(prompts, asked, 12)
    alone = [
        loop_over(engine).generate([prompt], [one], 12)[0] for prompt, one in zip(prompts[:20], asked, strict=False)
    ]
    assert alone == together[:20]
