"""The runner on a tiny random model: what it stores, what it never touches, and that chunking and hand-off change nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from serving.core.request import SamplingParams
from serving.engine.build import Engine
from serving.engine.plan import DecodeRow, PrefillChunk, SampledToken, SlotSpec, StepPlan
from serving.model.batch import PrefillBatch
from tests.engine_factory import GREEDY, create_engine, random_prompts

PROMPT = random_prompts([150], seed=5)[0]
PAGES = [7, 3, 11]
OTHER_PAGES = [20, 30, 25]
NUM_NEW = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def engine(folder: Path) -> Engine:
    torch.set_num_threads(1)
    return create_engine(folder, num_pages=40, max_num_seqs=4)


def _spec(token_ids: list[int], page_ids: list[int], **fields: object) -> SlotSpec:
    spec = SlotSpec(sampling=GREEDY, token_ids=token_ids, num_prompt_tokens=len(PROMPT), page_ids=page_ids)
    return dataclasses.replace(spec, **fields)  # type: ignore[arg-type]


def _chunk(slot: int, start: int, end: int, pages: list[int], *, store_from: int | None = None) -> PrefillChunk:
    return PrefillChunk(
        slot=slot,
        token_ids=PROMPT[start:end],
        start=start,
        store_from=start if store_from is None else store_from,
        page_ids=pages,
        sample=end == len(PROMPT),
    )


def _run(engine: Engine, plan: StepPlan) -> tuple[SampledToken, ...]:
    return engine.runner.settle(engine.runner.launch(plan)).tokens


def _prefill(engine: Engine, slot: int, pages: list[int], borders: list[int]) -> SampledToken:
    engine.runner.open_slot(slot, _spec(PROMPT, pages))
    tokens: tuple[SampledToken, ...] = ()
    for start, end in zip([0, *borders], [*borders, len(PROMPT)], strict=True):
        tokens = _run(engine, StepPlan(chunks=(_chunk(slot, start, end, pages),)))
    return tokens[0]


def _decode(engine: Engine, slot: int, first: int, num: int = NUM_NEW) -> list[int]:
    tokens = [first]
    for position in range(len(PROMPT), len(PROMPT) + num):
        tokens.append(_run(engine, StepPlan(rows=(DecodeRow(slot=slot, position=position),)))[0].token_id)
    return tokens


def _rows(engine: Engine, pages: list[int], num_tokens: int) -> torch.Tensor:
    """[layers, tokens, row] of a sequence."""
    return engine.pool.tensor[pages].transpose(0, 1).flatten(1, 2)[:, :num_tokens]


def test_warming_up_touches_no_page_of_anybody_and_changes_no_text(engine: Engine) -> None:
    first = _prefill(engine, 0, PAGES, [64])
    text = _decode(engine, 0, first.token_id)
    engine.runner.close_slot(0)
    # As bits: most of the pool is NaN.
    bits = engine.pool.tensor.view(torch.int32)
    before = bits.clone()
    told: list[str] = []
    engine.runner.warm_up(max_batched_tokens=100, decodes=True, told=told.append)
    assert torch.equal(bits[:-1], before[:-1])
    assert not torch.equal(bits[-1], before[-1]), "nothing ran"
    assert told[0] == "compiling prefill of 1 tokens"
    assert "compiling prefill of 100 tokens" in told
    assert told[-1] == "compiling a decode step of 4 rows"
    assert _decode(engine, 0, _prefill(engine, 0, PAGES, [64]).token_id) == text


def test_who_only_prefills_has_no_code_for_each_number_of_rows_to_compile(engine: Engine) -> None:
    told: list[str] = []
    engine.runner.warm_up(max_batched_tokens=100, decodes=False, told=told.append)
    assert told == ["compiling prefill of 64 tokens", "compiling prefill of 100 tokens"]


@pytest.mark.parametrize("max_batched_tokens", [1, 100])
def test_warming_up_runs_prompts_with_a_cached_part_and_without(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, max_batched_tokens: int
) -> None:
    model, cached = engine.runner.model, set()
    prefill = model.prefill

    def noted(batch: PrefillBatch, kv_pool: torch.Tensor) -> torch.Tensor:
        cached.update(seq.context_len for seq in batch.seqs)
        return prefill(batch, kv_pool)

    monkeypatch.setattr(model, "prefill", noted)
    engine.runner.warm_up(max_batched_tokens=max_batched_tokens, decodes=False)
    assert cached == {0, 64}


def test_the_largest_step_is_warmed_up_though_no_text_is_so_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = create_engine(folder, num_pages=8, max_num_seqs=4)
    model, sizes = engine.runner.model, set()
    prefill = model.prefill

    def noted(batch: PrefillBatch, kv_pool: torch.Tensor) -> torch.Tensor:
        sizes.add((len(batch.token_ids_T), len(batch.seqs)))
        return prefill(batch, kv_pool)

    monkeypatch.setattr(model, "prefill", noted)
    # Texts have up to 512 tokens, of which 64 are cached.
    engine.runner.warm_up(max_batched_tokens=1000, decodes=False)
    assert (1000, 3) in sizes
    short = create_engine(folder, num_pages=1, max_num_seqs=4)
    monkeypatch.setattr(short.runner.model, "prefill", noted)
    short.runner.warm_up(max_batched_tokens=100, decodes=False)
    assert (100, 2) in sizes


def test_nothing_is_compiled_after_the_warm_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model, order = engine.runner.model, []
    prefill = model.prefill
    monkeypatch.setattr(model, "prefill", lambda *args: order.append("step") or prefill(*args))
    monkeypatch.setattr(model, "stop_compiling", lambda: order.append("stopped"))
    engine.runner.warm_up(max_batched_tokens=100, decodes=True)
    assert order[-1] == "stopped"
    assert order.count("stopped") == 1
    assert "step" in order


@pytest.mark.parametrize("borders", [[64], [1], [50, 51, 149], [64, 128]])
def test_chunks_store_the_same_rows_and_draw_the_same_token_as_one_piece(engine: Engine, borders: list[int]) -> None:
    whole = _prefill(engine, 0, PAGES, [])
    chunked = _prefill(engine, 1, OTHER_PAGES, borders)
    assert chunked.token_id == whole.token_id
    torch.testing.assert_close(_rows(engine, OTHER_PAGES, 150), _rows(engine, PAGES, 150), atol=1e-5, rtol=1e-5)
    hidden, expected = (torch.frombuffer(bytearray(t.hidden), dtype=torch.float32) for t in (chunked, whole))
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    _run(engine, StepPlan(chunks=(dataclasses.replace(_chunk(1, 0, 50, OTHER_PAGES), token_ids=PROMPT[1:51]),)))
    assert not torch.allclose(_rows(engine, OTHER_PAGES, 50), _rows(engine, PAGES, 50), atol=1e-2)


def test_decode_stores_the_rows_that_prefill_would_have_stored_mtp_among_them(engine: Engine) -> None:
    tokens = PROMPT[:140]
    engine.runner.open_slot(0, _spec(tokens, PAGES))
    _run(engine, StepPlan(chunks=(dataclasses.replace(_chunk(0, 0, 140, PAGES), sample=True),)))
    for position in range(140, 150):
        # The prompt's own next token instead of the drawn one.
        engine.runner._last_token_S[0] = PROMPT[position]
        _run(engine, StepPlan(rows=(DecodeRow(slot=0, position=position),)))
    _prefill(engine, 1, OTHER_PAGES, [])
    torch.testing.assert_close(_rows(engine, PAGES, 150), _rows(engine, OTHER_PAGES, 150), atol=1e-5, rtol=1e-5)
    assert _rows(engine, PAGES, 150)[-1, 0].eq(0).all(), "slot 0 has no MTP latent"
    assert _rows(engine, PAGES, 150)[-1, 1:].ne(0).any(dim=-1).all()


def test_a_mixed_step_draws_the_tokens_of_separate_steps(engine: Engine) -> None:
    first = _prefill(engine, 0, PAGES, [])
    expected = _decode(engine, 0, first.token_id, num=3)
    first = _prefill(engine, 2, PAGES, [])
    engine.runner.open_slot(1, _spec(PROMPT, OTHER_PAGES))
    mixed = []
    for i, (start, end) in enumerate(((0, 70), (70, 149), (149, 150))):
        plan = StepPlan(
            chunks=(_chunk(1, start, end, OTHER_PAGES),), rows=(DecodeRow(slot=2, position=len(PROMPT) + i),)
        )
        tokens = _run(engine, plan)
        mixed.append(tokens[-1].token_id)
    assert mixed == expected[1:]
    assert [(token.slot, bool(token.hidden)) for token in tokens] == [(1, True), (2, False)]
    assert tokens[0].token_id == expected[0]


def test_a_slot_opened_elsewhere_from_pages_token_and_hidden_state_goes_on_alike(engine: Engine, folder: Path) -> None:
    first = _prefill(engine, 0, PAGES, [])
    expected = _decode(engine, 0, first.token_id)
    peer = create_engine(folder, num_pages=40, max_num_seqs=4)
    spec = _spec([*PROMPT, first.token_id], OTHER_PAGES, hidden=first.hidden)
    num_rows = len(PROMPT) + NUM_NEW

    def handed_over(spec: SlotSpec, perturbed: float = 0.0) -> list[int]:
        peer.pool.tensor[OTHER_PAGES] = engine.pool.tensor[PAGES]
        peer.pool.tensor[OTHER_PAGES[2], :, len(PROMPT) % 64 :] = float("nan")
        peer.pool.tensor[OTHER_PAGES[1], 0, 20] += perturbed
        peer.runner.open_slot(3, spec)
        return _decode(peer, 3, first.token_id)

    assert handed_over(spec) == expected
    assert torch.equal(_rows(peer, OTHER_PAGES, num_rows), _rows(engine, PAGES, num_rows))
    handed_over(dataclasses.replace(spec, hidden=bytes(len(first.hidden))))
    assert not torch.equal(_rows(peer, OTHER_PAGES, num_rows)[-1], _rows(engine, PAGES, num_rows)[-1])
    assert handed_over(spec, perturbed=30.0) != expected


def test_rows_below_store_from_are_computed_and_never_written(engine: Engine) -> None:
    expected = _prefill(engine, 0, PAGES, [])
    shared = engine.pool.tensor[PAGES[:2]].clone()
    pages = [*PAGES[:2], 33]
    engine.runner.open_slot(1, _spec(PROMPT, pages))
    token = _run(engine, StepPlan(chunks=(_chunk(1, 127, 150, pages, store_from=128),)))[0]
    assert token.token_id == expected.token_id
    assert torch.equal(engine.pool.tensor[PAGES[:2]], shared)
    torch.testing.assert_close(_rows(engine, pages, 150), _rows(engine, PAGES, 150), atol=1e-5, rtol=1e-5)


def test_a_step_writes_to_its_own_rows_and_to_scratch_only(engine: Engine) -> None:
    _prefill(engine, 0, PAGES, [70])
    _decode(engine, 0, 0)
    free = [page for page in range(40) if page not in PAGES]
    assert engine.pool.tensor[free].isnan().all()
    assert engine.pool.tensor[PAGES[2], :, (150 + NUM_NEW) % 64 :].isnan().all()
    assert not _rows(engine, PAGES, 150 + NUM_NEW).isnan().any()


def test_a_new_page_is_appended_to_the_slots_page_table(engine: Engine) -> None:
    first = _prefill(engine, 0, [*PAGES, 12], [])
    expected = _decode(engine, 0, first.token_id, num=45)
    first = _prefill(engine, 1, OTHER_PAGES, [])
    tokens = [first.token_id]
    for position in range(150, 195):
        row = DecodeRow(slot=1, position=position, new_page_id=39 if position == 192 else None)
        tokens.append(_run(engine, StepPlan(rows=(row,)))[0].token_id)
    assert tokens == expected
    assert not engine.pool.tensor[39, :, :3].isnan().any()


def test_two_steps_may_be_in_flight_and_the_second_needs_nothing_of_the_first_on_the_host(engine: Engine) -> None:
    first = _prefill(engine, 0, PAGES, [])
    expected = _decode(engine, 0, first.token_id, num=4)
    first = _prefill(engine, 1, OTHER_PAGES, [])
    runner = engine.runner
    plans = [StepPlan(rows=(DecodeRow(slot=1, position=150 + i),)) for i in range(4)]
    in_flight, tokens = [runner.launch(plans[0])], [first.token_id]
    for plan in plans[1:]:
        in_flight.append(runner.launch(plan))
        tokens.append(runner.settle(in_flight.pop(0)).tokens[0].token_id)
    tokens.append(runner.settle(in_flight.pop()).tokens[0].token_id)
    assert tokens == expected
    in_flight = [runner.launch(plans[0]), runner.launch(plans[0])]
    with pytest.raises(AssertionError, match="settle a step"):
        runner.launch(plans[0])


def test_logprobs_and_seeded_draws_reach_the_result(engine: Engine) -> None:
    params = SamplingParams(temperature=1.0, seed=4, logprobs=2)
    engine.runner.open_slot(0, _spec(PROMPT, PAGES, sampling=params))
    token = _run(engine, StepPlan(chunks=(_chunk(0, 0, 150, PAGES),)))[0]
    assert token.logprobs is not None
    assert len(token.logprobs.top_ids) == 2
    assert token.logprobs.top_logprobs[0] >= token.logprobs.logprob
