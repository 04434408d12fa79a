"""Prefill steps as they are captured, with cached parts and without, run on a CPU as they stand: what they say and store is what parts do."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.engine import chunks as chunks_module
from serving.engine.build import Engine
from serving.engine.graphs import StepGraphs
from serving.engine.plan import PrefillChunk, SampledToken, SlotSpec, StepPlan
from tests.engine_factory import GREEDY, create_engine, create_loop, random_prompts

CAPACITIES = (0, 128, 320)
TEXTS = random_prompts([30, 100, 90, 200], seed=5)
PAGES = [[7], [3, 11], [20, 30], [25, 1, 39, 12]]
# Cached before the chunk, and from where on the chunk's rows are stored: none, a part of a page, a page, and what is computed again.
STARTS, STORE_FROM = [0, 7, 64, 127], [0, 7, 64, 128]


class Steps(StepGraphs):
    """The body itself at each run. Scratch is NaN before it: who attends what is nobody's shows."""

    def __init__(self, engine: Engine, capacity: int, taken: list[tuple[int, int]]) -> None:
        self.sizes = [64, 256]
        self._chunks, self._pool, self._capacity, self._taken = engine.runner._chunks, engine.pool, capacity, taken

    def captured_for(self, number: int) -> int | None:
        return self.size_for(number)

    def run(self, size: int, values: Sequence[int]) -> tuple[Tensor, ...]:
        assert len(values) == len(self._chunks._idle(size))
        self._taken.append((self._capacity, size))
        self._pool.poison(self._pool.num_pages)
        return self._chunks._captured(self._capacity, size, torch.tensor(values))


def capture(engine: Engine) -> list[tuple[int, int]]:
    """What its steps run from here on: capacity and number of tokens of each."""
    taken: list[tuple[int, int]] = []
    engine.runner._chunks._graphs = {capacity: Steps(engine, capacity, taken) for capacity in CAPACITIES}
    return taken


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("model")


def begun(folder: Path) -> Engine:
    """Slots whose cached parts are there."""
    engine = create_engine(folder, num_pages=40, max_num_seqs=4)
    for slot, (text, pages, start) in enumerate(zip(TEXTS, PAGES, STORE_FROM, strict=True)):
        spec = SlotSpec(sampling=GREEDY, token_ids=text, num_prompt_tokens=len(text), page_ids=pages)
        engine.runner.open_slot(slot, spec)
        if start:
            _run(engine, [_chunk(slot, 0, start, store_from=0)])
    return engine


def _chunk(slot: int, start: int, end: int, *, store_from: int) -> PrefillChunk:
    tokens = TEXTS[slot][start:end]
    return PrefillChunk(
        slot=slot, token_ids=tokens, start=start, store_from=store_from, page_ids=PAGES[slot], sample=True
    )


def _run(engine: Engine, chunks: list[PrefillChunk]) -> tuple[SampledToken, ...]:
    return engine.runner.settle(engine.runner.launch(StepPlan(chunks=tuple(chunks)))).tokens


def said_and_stored(engine: Engine) -> tuple[list[int], Tensor, Tensor]:
    """Of a step that goes on in all slots: tokens, hidden states [N, D], and all pages but scratch."""
    tokens = _run(engine, [_chunk(i, STARTS[i], len(text), store_from=STORE_FROM[i]) for i, text in enumerate(TEXTS)])
    hidden = [torch.frombuffer(bytearray(token.hidden), dtype=torch.float32) for token in tokens]
    return [token.token_id for token in tokens], torch.stack(hidden), engine.pool.tensor[:-1].clone()


def test_a_captured_step_behind_contexts_says_and_stores_what_its_parts_do(folder: Path) -> None:
    want = said_and_stored(begun(folder))
    engine = begun(folder)
    taken = capture(engine)
    got = said_and_stored(engine)
    assert taken == [(320, 256)]
    assert got[0] == want[0]
    torch.testing.assert_close(got[1:], want[1:], rtol=1e-4, atol=1e-4, equal_nan=True)
    assert not got[2][PAGES[3], -1].flatten(0, 1)[1:200].isnan().any(), "the MTP layer's rows are missing"
    assert got[2][PAGES[1][1], 0, 36:].isnan().all(), "rows past the text were written"


def test_one_wrong_row_of_a_context_shows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = said_and_stored(begun(folder))
    right = chunks_module.packed_context_slots

    def wrong(kv_pool: Tensor, page_table_NP: Tensor, starts: Tensor, size: int) -> Tensor:
        slots_C = right(kv_pool, page_table_NP, starts, size)
        slots_C[3] = slots_C[2]
        return slots_C

    monkeypatch.setattr(chunks_module, "packed_context_slots", wrong)
    engine = begun(folder)
    capture(engine)
    _, hidden_ND, _ = said_and_stored(engine)
    assert not torch.allclose(hidden_ND[1], want[1][1], atol=1e-3)
    torch.testing.assert_close(hidden_ND[[0, 2, 3]], want[1][[0, 2, 3]], rtol=1e-4, atol=1e-4)


def test_texts_behind_found_prefixes_and_of_long_prompts_are_the_same(folder: Path) -> None:
    """Many requests at once; more cached rows than a captured step holds are launched piece by piece."""
    rng = random.Random(1)
    common = random_prompts([500], seed=2)[0]
    tails = random_prompts([rng.randrange(1, 60) for _ in range(24)], seed=3)
    found = [common[: rng.choice([0, 64, 128, 192, 300, 448])] + tail for tail in tails]

    def texts(engine: Engine) -> list[list[int]]:
        loop = create_loop(engine, max_batched_tokens=128)
        return loop.generate([common], GREEDY, 2) + loop.generate(found, GREEDY, 6)

    sizes = {"num_pages": 96, "max_num_seqs": 32}
    want = texts(create_engine(folder, **sizes))
    engine = create_engine(folder, **sizes)
    taken, launched = capture(engine), []
    launch = engine.runner._chunks._launch
    engine.runner._chunks._launch = lambda packed, chunks: (
        launched.append(  # type: ignore[method-assign]
            sum(chunk.start for chunk in chunks)
        )
        or launch(packed, chunks)
    )
    assert texts(engine) == want
    assert {capacity for capacity, _ in taken} == set(CAPACITIES)
    assert launched
    assert min(launched) > CAPACITIES[-1]


def test_idle_steps_touch_scratch_alone(folder: Path) -> None:
    engine = begun(folder)
    before = engine.pool.tensor.view(torch.int32).clone()
    for capacity in CAPACITIES:
        with torch.inference_mode():
            engine.runner._chunks._captured(capacity, 64, torch.tensor(engine.runner._chunks._idle(64)))
    after = engine.pool.tensor.view(torch.int32)
    assert torch.equal(after[:-1], before[:-1])
    assert not torch.equal(after[-1], before[-1])
