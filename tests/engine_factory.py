"""Engines over tiny random checkpoints, and sampling written a second time: one row, plain Python floats, no tensor operation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.core.request import SamplingParams, Sequence
from serving.engine.build import Engine, build_engine
from tests.model_factory import make_checkpoint

GREEDY = SamplingParams(temperature=0.0)
VOCAB_SIZE = 128
MASK_64 = 2**64 - 1


def create_engine(
    folder: Path,
    *,
    num_pages: int = 96,
    max_num_seqs: int = 32,
    seed: int = 0,
    draft_tokens: str = "0",
    **overrides: Any,
) -> Engine:
    """fp32 on the CPU; every page is NaN until somebody writes it. `overrides` go into config.json."""
    if not (folder / "config.json").exists():
        make_checkpoint(folder, seed, **overrides)
    engine = build_engine(
        folder,
        max_num_seqs=max_num_seqs,
        num_pages=num_pages,
        dtype="float32",
        device="cpu",
        draft_tokens=draft_tokens,
    )
    if engine.draft_tokens:
        engine.runner.warm_up(max_batched_tokens=0, decodes=True)
    engine.pool.poison_all()
    return engine


def create_loop(
    engine: Engine, *, num_pages: int | None = None, prefix_cache: bool = True, **options: Any
) -> Aggregated:
    """`options`: those of Aggregated; a page that becomes free is NaN again; a small `num_pages` makes room scarce."""
    num_pages = engine.pool.num_pages if num_pages is None else num_pages
    manager = KVManager(num_pages, prefix_cache=prefix_cache, on_free=engine.pool.poison)
    defaults = {"num_slots": engine.max_num_seqs, "max_batched_tokens": 256, "max_model_len": engine.max_model_len}
    return Aggregated(engine.runner, manager, **(defaults | options))


def create_sequence(job_id: str, token_ids: list[int], **fields: Any) -> Sequence:
    defaults: dict[str, Any] = {
        "num_prompt_tokens": len(token_ids),
        "sampling": GREEDY,
        "max_new_tokens": 8,
        "deadline_s": math.inf,
    }
    return Sequence(job_id=job_id, token_ids=list(token_ids), **(defaults | fields))


def random_prompts(lengths: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def uniform_reference(seed: int, position: int) -> float:
    """SplitMix64 as published, on Python integers: the stream begun at the first output of the stream of `seed`."""
    state = (_splitmix_output(seed + 0x9E3779B97F4A7C15) + (position + 1) * 0x9E3779B97F4A7C15) & MASK_64
    return (_splitmix_output(state) >> 16) / 2**48


def _splitmix_output(state: int) -> int:
    z = state & MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
    return z ^ (z >> 31)


def penalised_reference(
    logits: list[float], params: SamplingParams, token_ids: list[int], num_prompt: int
) -> list[float]:
    """Logit bias, then repetition over prompt and output, then frequency and presence over the output."""
    out = [logit + params.logit_bias.get(token, 0.0) for token, logit in enumerate(logits)]
    for token in set(token_ids):
        out[token] = (
            out[token] / params.repetition_penalty if out[token] > 0 else out[token] * params.repetition_penalty
        )
    for token in token_ids[num_prompt:]:
        out[token] -= params.frequency_penalty
    for token in set(token_ids[num_prompt:]):
        out[token] -= params.presence_penalty
    return out


def probabilities_reference(logits: list[float], params: SamplingParams) -> list[float]:
    """Temperature, top-k, top-p, min-p: what a token is drawn from. Not for temperature 0."""
    scaled = [logit / params.temperature for logit in logits]
    ranked = sorted(scaled, reverse=True)
    least = ranked[params.top_k - 1] if 0 < params.top_k < len(ranked) else -math.inf
    kept = [value for value in ranked if value >= least]
    total = sum(math.exp(value - ranked[0]) for value in kept)
    mass, nucleus = 0.0, []
    for value in kept:
        if nucleus and params.top_p < 1 and mass >= params.top_p:
            break
        nucleus.append(value)
        mass += math.exp(value - ranked[0]) / total
    least = max(nucleus[-1], ranked[0] + math.log(params.min_p) if params.min_p > 0 else -math.inf)
    weights = [math.exp(value - ranked[0]) if value >= least else 0.0 for value in scaled]
    return [weight / sum(weights) for weight in weights]


def sample_reference(
    logits: list[float], params: SamplingParams, token_ids: list[int], num_prompt: int, position: int
) -> int:
    logits = penalised_reference(logits, params, token_ids, num_prompt)
    if params.temperature == 0:
        return logits.index(max(logits))
    target, total = uniform_reference(params.seed, position), 0.0
    for token, probability in enumerate(probabilities_reference(logits, params)):
        total += probability
        if total > target:
            return token
    raise AssertionError("probabilities sum to 1 and the target is below it")
