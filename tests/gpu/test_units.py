"""Units of two ranks on two GPUs write what one GPU writes: heads or experts shared, captured steps and eager ones, ranks without work.

A unit takes some six seconds to start, and is slowed down by others on its GPUs, which take turns with it where it waits for the other
rank. So workers of one run share what one GPU wrote, and four of them are as fast as twelve.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import itertools
import json
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from serving.bench.processes import Generation, Load, Sizes, Unit
from serving.core.errors import BatonError
from serving.core.request import TokenLogprobs
from serving.engine.build import Engine
from serving.engine.plan import Launched, SlotSpec, StepResult
from serving.engine.unit import MicroBatches
from serving.kernels.quant import Fp8Weight
from serving.parallel.dispatch import HierarchicalDispatch
from tests.fp8_model import WIDE
from tests.gpu.texts import DEMO, TIE, partings, trained_questions
from tests.model_factory import make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
    pytest.mark.timeout(120),
]

NUM_REQUESTS = 32
NEW_TOKENS = 24
PATIENCE_S = 2.0
LENGTHS = [1, 5, 63, 64, 65, 128, 200, 300, 700]
LOAD = Load(
    folder=DEMO, prompts=NUM_REQUESTS, prompt_tokens=max(LENGTHS), new_tokens=NEW_TOKENS, max_batched_tokens=1024
)
ONE = Sizes(device="cuda", split_from=MicroBatches(prefill_tokens=512, rows=16))
TP2, EP2 = replace(ONE, tp=2, dispatch="nccl"), replace(ONE, dp=2, dispatch="nccl")
HOSTED = replace(EP2, hosted_slots=12)
SIZES = {
    "TP2": TP2,
    "EP2": EP2,
    "TP2, peer memory": replace(TP2, dispatch="symmetric"),
    "EP2, peer memory": replace(EP2, dispatch="symmetric"),
    "EP2, two nodes": replace(EP2, dispatch="auto", ranks_per_node=1),
}
_NUMBERS = itertools.count()

Altered = Callable[[Engine, int], None]
Generate = Callable[..., Generation]
"""Prompts, new tokens, logarithms; load and dtype -> what one GPU generates."""


@dataclass(frozen=True)
class Token:
    token_id: int
    logprobs: TokenLogprobs | None


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Unit]]:
    """Units of the module, each started once; those that were altered are their test's own."""
    folder = tmp_path_factory.mktemp("units")
    running: dict[tuple[Sizes, Load], Unit] = {}

    def opened(stack: ExitStack, sizes: Sizes, load: Load, altered: Altered | None = None) -> Unit:
        scratch = folder / f"gpu-units-{os.getpid()}-{next(_NUMBERS)}"
        scratch.mkdir()
        return stack.enter_context(Unit(sizes, load, scratch, altered=altered))

    with ExitStack() as stack:

        def unit(sizes: Sizes, load: Load = LOAD, altered: Altered | None = None) -> Unit:
            if altered is not None:
                return opened(stack, sizes, load, altered)
            known = running.get((sizes, load))
            if known is None or not known.processes[0].is_alive():
                known = running[sizes, load] = opened(stack, sizes, load)
            return known

        yield unit


@pytest.fixture(scope="module")
def alone(start: Callable[..., Unit], shared: Path) -> Generate:
    """By whichever worker of the run asks first."""

    def generated(
        prompts: list[list[int]],
        new_tokens: int,
        logprobs: int | None = None,
        *,
        load: Load = LOAD,
        dtype: str = "float32",
    ) -> Generation:
        asked = pickle.dumps((prompts, new_tokens, logprobs, load, dtype))
        path = shared / f"alone-{hashlib.sha256(asked).hexdigest()}"
        with one_at_a_time(path):
            if not path.exists():
                found = start(replace(ONE, dtype=dtype), load).generate(prompts, new_tokens, logprobs)
                path.write_bytes(pickle.dumps(found))
        known: Generation = pickle.loads(path.read_bytes())
        return known

    return generated


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(2, 256) for _ in range(rng.choice(LENGTHS))] for _ in range(NUM_REQUESTS)]


def eager(engine: Engine, rank: int) -> None:
    """What is captured is launched instead of replayed."""
    graphs: Any = engine.runner._decode_graphs
    graphs.run = lambda size, values: graphs._body(size, torch.tensor(values, device=engine.runner.device))


def with_another_expert(engine: Engine, rank: int) -> None:
    if rank == 1:
        slots = engine.runner.model.expert_slots  # type: ignore[attr-defined]
        slots.write(2, 3, [tensor * 2 for tensor in slots.read(2, 3)])


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("sizes", [*SIZES.values(), HOSTED], ids=[*SIZES, "hosted"])
def test_greedy_text_in_fp32_is_that_of_one_gpu(
    start: Callable[..., Unit], alone: Generate, prompts: list[list[int]], sizes: Sizes, micro_batches: int
) -> None:
    """Ranks with two micro-batches see their own GPU alone, as the server starts them."""
    unit = start(replace(sizes, micro_batches=micro_batches, sees_own_gpu_alone=micro_batches == 2))
    expected = alone(prompts, NEW_TOKENS).texts
    assert unit.generate(prompts, NEW_TOKENS).texts == expected
    # With fewer rows, another captured step.
    assert unit.generate(prompts[:5], NEW_TOKENS).texts == expected[:5]
    # Ranks without work change nothing: one request at a time for one of the groups, then two of which one goes on alone.
    lengths = [NEW_TOKENS, 1] * 3
    some = [text[:length] for text, length in zip(expected, lengths, strict=False)]
    assert unit.generate(prompts[:6], lengths).texts == some
    assert unit.generate(prompts[:2], lengths[:2]).texts == some[:2]
    unit.close()
    assert [process.exitcode for process in unit.processes] == [0, 0]


def generations(unit: Unit, prompts: list[list[int]], number: int) -> list[Generation]:
    return [unit.generate(prompts, NEW_TOKENS) for _ in range(number)]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_experts_that_change_places_change_no_text(
    start: Callable[..., Unit], alone: Generate, prompts: list[list[int]], sizes: Sizes
) -> None:
    generated = generations(start(replace(sizes, balances=True)), prompts, 8)
    assert [each.texts for each in generated] == [alone(prompts, NEW_TOKENS).texts] * 8
    versions = [each.placement_version for each in generated]
    assert versions == sorted(versions)
    assert versions[-1] > versions[0] + 1


@pytest.mark.parametrize("sizes", [TP2, EP2], ids=["TP2", "EP2"])
def test_steps_launched_one_by_one_write_the_same(
    start: Callable[..., Unit], alone: Generate, prompts: list[list[int]], sizes: Sizes
) -> None:
    unit = start(sizes, altered=eager)
    assert unit.generate(prompts, NEW_TOKENS).texts == alone(prompts, NEW_TOKENS).texts


@pytest.mark.parametrize("sizes", [TP2, EP2], ids=["TP2", "EP2"])
def test_another_expert_on_one_rank_is_seen(
    start: Callable[..., Unit], alone: Generate, prompts: list[list[int]], sizes: Sizes
) -> None:
    unit = start(sizes, altered=with_another_expert)
    assert unit.generate(prompts, NEW_TOKENS).texts != alone(prompts, NEW_TOKENS).texts


def answers(found: Generation) -> list[list[Token]]:
    """Up to their end."""
    end = 1
    texts = []
    for ids, logprobs in zip(found.texts, found.logprobs, strict=True):
        upto = ids.index(end) + 1 if end in ids else len(ids)
        texts.append([Token(*token) for token in zip(ids[:upto], logprobs, strict=False)])
    return texts


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_greedy_answers_in_bf16_part_from_one_gpus_only_at_ties(
    start: Callable[..., Unit], alone: Generate, sizes: Sizes, micro_batches: int
) -> None:
    questions = trained_questions(NUM_REQUESTS // 8)
    load = replace(LOAD, prompt_tokens=max(map(len, questions)))
    unit = start(replace(sizes, dtype="bfloat16", micro_batches=micro_batches), load)
    found = answers(unit.generate(questions, NEW_TOKENS, 20))
    expected = answers(alone(questions, NEW_TOKENS, 20, load=load, dtype="bfloat16"))
    parted = partings(found, expected)
    print(f"bf16: {len(parted)} of {len(questions)} answers part, at gaps of {[round(gap, 4) for gap in parted]}")
    assert all(gap <= TIE for gap in parted)
    if micro_batches == 1 and sizes in (TP2, EP2):
        wrong = start(replace(sizes, dtype="bfloat16"), load, with_wrong_experts)
        assert any(gap > TIE for gap in partings(answers(wrong.generate(questions, NEW_TOKENS, 20)), expected))


def with_wrong_experts(engine: Engine, rank: int) -> None:
    """So many that the trained model is unsure of its answers."""
    slots = engine.runner.model.expert_slots  # type: ignore[attr-defined]
    for layer, slot in itertools.product(range(slots.num_layers if rank == 1 else 0), range(slots.num_slots)):
        slots.write(layer, slot, [-tensor for tensor in slots.read(layer, slot)])


def with_other_scales(engine: Engine, rank: int) -> None:
    if rank == 1:
        for layer in engine.runner.model.blocks[1:]:  # type: ignore[attr-defined]
            assert isinstance(layer.mlp.down, Fp8Weight)
            layer.mlp.down.scales.mul_(1.2)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_rows_that_travel_in_fp8_are_as_exact_as_those_that_stay(
    start: Callable[..., Unit], alone: Generate, shared: Path, sizes: Sizes
) -> None:
    """Against fp32 on the same weights, since between the two of them a value goes to either side for one rounding of bf16."""
    folder = shared / "fp8"
    with one_at_a_time(folder):
        if not folder.exists():
            folder.mkdir()
            make_checkpoint(folder, 3, storage="fp8", **WIDE)
    rng = random.Random(1)
    prompts = [[rng.randrange(2, 100) for _ in range(40)] for _ in range(16)]
    load = replace(LOAD, folder=folder, prompts=16, prompt_tokens=64)

    def generated(altered: Altered | None = None) -> Generation:
        return start(replace(sizes, dtype="bfloat16"), load, altered).generate(prompts, 2, 20)

    def firsts(found: Generation) -> list[TokenLogprobs]:
        return [first for first, *_ in found.logprobs if first is not None]

    def error(found: Generation) -> float:
        gaps = []
        for mine, theirs in zip(firsts(found), exact, strict=True):
            known = dict(zip(theirs.top_ids, theirs.top_logprobs, strict=True))
            gaps += [
                abs(logprob - known[token])
                for token, logprob in zip(mine.top_ids, mine.top_logprobs, strict=True)
                if token in known
            ]
        return sum(gaps) / len(gaps)

    found = generated()
    exact = firsts(alone(prompts, 2, 20, load=load))
    allowed = 1.25 * error(alone(prompts, 2, 20, load=load, dtype="bfloat16"))
    got = error(found)
    print(f"mean error of a logarithm: {got:.5f}, allowed {allowed:.5f}")
    assert 0 < got <= allowed
    if sizes in (TP2, EP2):
        assert error(generated(with_other_scales)) > allowed


@pytest.mark.parametrize("role", ["prefill", "both"])
def test_prompts_go_by_nodes_where_there_are_several(
    start: Callable[..., Unit], prompts: list[list[int]], role: str
) -> None:
    expected = [text[:1] for text in start(ONE).generate(prompts, NEW_TOKENS).texts]
    sizes = replace(SIZES["EP2, two nodes"], role=role)
    assert start(sizes, LOAD, going_by_nodes).generate(prompts, 1).texts == expected
    assert start(sizes, LOAD, with_another_expert).generate(prompts, 1).texts != expected


def going_by_nodes(engine: Engine, rank: int) -> None:
    routing = engine.runner.model.routing  # type: ignore[attr-defined]
    assert isinstance(routing.dispatch, HierarchicalDispatch)


@pytest.mark.skipif(importlib.util.find_spec("deep_ep") is None, reason="DeepEP is not installed")
def test_first_tokens_over_deepep_are_those_over_nccl(start: Callable[..., Unit]) -> None:
    """Of a unit for prefill, the one that may dispatch so; in bf16, all that DeepEP sums."""
    questions = trained_questions(NUM_REQUESTS // 8)
    load = replace(LOAD, prompt_tokens=max(map(len, questions)), new_tokens=1)

    def firsts(dispatch: str, altered: Altered | None = None) -> list[list[Token]]:
        sizes = replace(EP2, role="prefill", dtype="bfloat16", dispatch=dispatch)
        found = start(sizes, load, altered).generate(questions, 1, 20)
        return [
            [Token(*first) for first in zip(ids, of_text, strict=True)]
            for ids, of_text in zip(found.texts, found.logprobs, strict=True)
        ]

    expected, found = firsts("nccl"), firsts("deepep")
    same = sum(mine == theirs for mine, theirs in zip(found, expected, strict=True))
    print(f"deepep: {same} of {len(questions)} first tokens have the same logarithms, to the last bit")
    assert all(gap <= TIE for gap in partings(found, expected))
    assert any(gap > TIE for gap in partings(firsts("deepep", with_wrong_experts), expected))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "hung"])
@pytest.mark.parametrize("prompt_tokens", [64, 7000], ids=["in decode", "in prefill"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_rank_that_is_gone_ends_the_unit(
    start: Callable[..., Unit], sizes: Sizes, prompt_tokens: int, how: signal.Signals
) -> None:
    new_tokens = 7064 - prompt_tokens
    long = replace(LOAD, prompts=8, prompt_tokens=prompt_tokens, new_tokens=new_tokens, max_batched_tokens=128)
    unit = start(sizes, long, altered=impatient)
    victim = unit.processes[1].pid
    assert victim is not None
    began_s: list[float] = []

    def end() -> None:
        os.kill(victim, how)
        began_s.append(time.monotonic())

    timer = threading.Timer(0.5, end)
    timer.start()
    rng = random.Random(2)
    prompts = [[rng.randrange(2, 256) for _ in range(prompt_tokens)] for _ in range(long.prompts)]
    with pytest.raises(BatonError, match="rank 1 did not come"):
        unit.generate(prompts, new_tokens)
    took_s = time.monotonic() - began_s[0]
    print(f"{how.name}: named after {took_s:.2f} s")
    assert took_s < (1.0 if how == signal.SIGKILL else 2 * PATIENCE_S)
    unit.processes[0].join(20.0)
    assert unit.processes[0].exitcode is not None


def impatient(engine: Engine, rank: int) -> None:
    lockstep = engine.lockstep
    assert lockstep is not None
    assert lockstep.watch is not None
    for group in (lockstep.watch, lockstep._world, lockstep._tp):
        if hasattr(group, "_deadline_s"):
            group._deadline_s = PATIENCE_S


@pytest.mark.parametrize("sizes", [EP2, SIZES["TP2, peer memory"]], ids=["EP2", "TP2, peer memory"])
def test_a_rank_that_dies_while_experts_change_places_has_changed_no_token(
    start: Callable[..., Unit], alone: Generate, prompts: list[list[int]], tmp_path: Path, sizes: Sizes
) -> None:
    path = tmp_path / "tokens"
    unit = start(replace(sizes, balances=True), altered=partial(dies_while_preparing, path))
    with pytest.raises(BatonError, match="rank 1 did not come"):
        generations(unit, prompts, 8)
    texts: list[tuple[list[int], list[int]]] = []
    of_slot: dict[int, list[int]] = {}
    for line in path.read_text().splitlines():
        slot, token, prompt = json.loads(line)
        if prompt is not None:
            of_slot[slot] = []
            texts.append((prompt, of_slot[slot]))
        elif len(of_slot[slot]) < NEW_TOKENS:
            # A step that was in flight at its end adds to nobody's text.
            of_slot[slot].append(token)
    expected = dict(zip(map(tuple, prompts), alone(prompts, NEW_TOKENS).texts, strict=True))
    assert all(expected[tuple(prompt)][: len(text)] == text for prompt, text in texts)
    assert any(0 < len(text) < NEW_TOKENS for _, text in texts)
    turned = texts[1:] + texts[:1]
    assert any(
        expected[tuple(prompt)][: len(text)] != text for (prompt, _), (_, text) in zip(texts, turned, strict=True)
    )


def dies_while_preparing(path: Path, engine: Engine, rank: int) -> None:
    """Rank 1, when the first weights have come, before it has said so. Rank 0 notes every token before anybody sees it."""
    runner: Any = engine.runner
    if rank == 1:
        assert engine.balancing is not None
        live: Any = engine.balancing._live
        live._verify = lambda moves: os.kill(os.getpid(), signal.SIGKILL)
        return
    file = path.open("a", buffering=1)
    opened, settled = runner.open_slot, runner.settle

    def open_slot(slot: int, spec: SlotSpec) -> None:
        print(json.dumps([slot, None, spec.token_ids[: spec.num_prompt_tokens]]), file=file)
        opened(slot, spec)

    def settle(launched: Launched) -> StepResult:
        result: StepResult = settled(launched)
        for token in result.tokens:
            print(json.dumps([token.slot, token.token_id, None]), file=file)
        return result

    runner.open_slot, runner.settle = open_slot, settle
