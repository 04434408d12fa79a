"""After warm-up no request waits for a compiler."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import triton
from triton.runtime.jit import JITFunction

from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.core.config import KernelsTable
from serving.core.request import SamplingParams
from serving.engine import build
from serving.engine.build import Engine
from serving.engine.drafting import Drafting
from serving.kernels.quant import Fp8Weight
from serving.model.config import ModelConfig
from tests.fp8_model import WIDE
from tests.gpu.asked import ASKED, GREEDY
from tests.model_factory import make_checkpoint

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


LENGTHS = [1, 2, 3, 17, 63, 64, 100, 129, 200, 255, 333, 500]


def forget_kernels() -> None:
    """What this process has compiled before, for another engine, is heard of again when it is needed."""
    for name, module in list(sys.modules.items()):
        if name.startswith("serving.kernels."):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()


def warm(folder: Path, dtype: str, *, draft_tokens: str = "0", decodes: bool = True) -> Engine:
    """With our products alone: a library's compiler is none of Triton's. Its tokenizer is smaller than its head, as V3's, and odd."""
    forget_kernels()
    size = ModelConfig.from_folder(folder).vocab_size - 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "tokenizer_size", lambda _: size)
        engine = build.build_engine(
            folder,
            max_num_seqs=8,
            num_pages=256,
            dtype=dtype,
            device="cuda",
            draft_tokens=draft_tokens,
            kernels=KernelsTable(linear_fp8="baton"),
        )
    assert engine.runner.sampler.vocab_size == size
    with compilations() as seen:
        engine.runner.warm_up(max_batched_tokens=512, decodes=decodes)
    assert seen, "the hook hears nothing"
    return engine


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    make_checkpoint(folder, 3, storage="fp8", **WIDE)
    return folder


@pytest.fixture(
    scope="module",
    params=[("bfloat16", "0"), ("float32", "0"), ("bfloat16", "2"), ("float32", "2"), ("fp8", "0"), ("fp8", "2")],
    ids=lambda made: f"{made[0]}, {made[1]} drafts",
)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Warmed up once for all that is asked: what one request compiles is there for the next."""
    dtype, draft_tokens = request.param
    if dtype != "fp8":
        return warm(DEMO, dtype, draft_tokens=draft_tokens)
    made = warm(request.getfixturevalue("fp8_folder"), "bfloat16", draft_tokens=draft_tokens)
    assert isinstance(made.runner.model.blocks[0].attention.out, Fp8Weight)  # type: ignore[attr-defined]
    return made


class Turns(Drafting):
    """None, one and two drafts in turn."""

    def __init__(self) -> None:
        super().__init__(2, lambda num_rows, num_drafts: 1.0)
        self.numbers: list[int] = []

    def choose(self, num_rows: int, most: int) -> int:
        self.numbers.append(max(0, min(len(self.numbers) % 3, most)))
        return self.numbers[-1]


def prompts_of(engine: Engine) -> tuple[list[list[int]], list[int]]:
    """Prompts, and what may stand before them."""
    rng = random.Random(0)
    most = min(256, engine.model_config.vocab_size)
    common = [rng.randrange(2, most) for _ in range(640)]
    return [[rng.randrange(2, most) for _ in range(length)] for length in LENGTHS], common


def loop_over(engine: Engine, drafting: Drafting | None) -> Aggregated:
    return Aggregated(
        engine.runner,
        KVManager(engine.pool.num_pages, prefix_cache=True),
        num_slots=engine.max_num_seqs,
        max_batched_tokens=512,
        max_model_len=engine.max_model_len,
        run_ahead=True,
        drafting=drafting,
    )


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_no_request_compiles(engine: Engine, asked: SamplingParams) -> None:
    drafting = Turns() if engine.draft_tokens else None
    loop = loop_over(engine, drafting)
    prompts, common = prompts_of(engine)
    # Rows that ask for something stand beside greedy ones.
    each = [GREEDY if i % 4 == 3 else asked for i in range(len(prompts))]
    with compilations() as seen:
        loop.generate(prompts, each, 8)
        # A part of the context cached, and odd numbers of tokens behind it.
        for length in (64, 128, 320, 640):
            loop.generate([common[:length] + prompt for prompt in prompts[:10]], each[:10], 2)
        # The same of steps that have more cached than is captured.
        chunks = engine.runner._chunks
        chunks._graphs, captured = {0: chunks._graphs[0]}, chunks._graphs
        for length in (64, 128, 320, 640):
            loop.generate([common[:length] + prompt[::-1] for prompt in prompts[2:12]], each[2:12], 2)
        chunks._graphs = captured
    assert drafting is None or {0, 1, 2} <= set(drafting.numbers)
    assert not seen, "\n".join(seen)


def test_a_request_that_compiles_is_heard() -> None:
    engine = warm(DEMO, "float32", decodes=False)
    prompts, _ = prompts_of(engine)
    with compilations() as seen:
        loop_over(engine, None).generate(prompts[:4], GREEDY, 2)
    assert any(name.startswith("_decode_kernel ") for name in seen)
