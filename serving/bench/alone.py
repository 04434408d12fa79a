"""The engine alone, in a process of its own: what the served path is compared with.

    spawned -> loading -> waiting for prompts -> a wave -> waiting ...      it ends when its pipe does

Mode `both` over one engine, with the settings of the decode worker it stands beside: threads, slots, pages, types.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.core.collector import pass_over_what_is_loaded
from serving.core.config import Config
from serving.core.errors import StartupError
from serving.core.request import SamplingParams
from serving.core.request import Sequence as Job
from serving.engine.build import build_engine
from serving.engine.drafting import Drafting

_LOAD_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """Seconds since the wave began."""

    first_s: float
    last_s: float
    token_ids: list[int]


class EngineAlone:
    """Loads on entry; `generate` runs one wave, greedy, every answer of the same length."""

    def __init__(self, model_dir: Path, config: Config, num_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, self._other = context.Pipe()
        arguments = (self._other, model_dir, config, num_threads)
        self._process = context.Process(target=_run, args=arguments, name="engine-alone", daemon=True)

    def __enter__(self) -> EngineAlone:
        """Raises StartupError if it does not load."""
        self._process.start()
        self._other.close()
        try:
            if self._pipe.poll(_LOAD_TIMEOUT_S) and self._pipe.recv():
                return self
        except EOFError:
            pass
        self._end()
        raise StartupError("the engine alone does not load; its own message says why")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._pipe.close()
        self._process.join(5.0)
        self._process.kill()
        self._process.join()

    def generate(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> list[TimedAnswer]:
        self._pipe.send((prompts, num_new_tokens))
        answers: list[TimedAnswer] = self._pipe.recv()
        return answers


def _run(pipe: Connection, model_dir: Path, config: Config, num_threads: int) -> None:
    loop = _build(model_dir, config, num_threads)
    pass_over_what_is_loaded()
    pipe.send(True)
    while True:
        try:
            prompts, num_new_tokens = pipe.recv()
        except EOFError:
            return
        pipe.send(_wave(loop, prompts, num_new_tokens))


def _build(model_dir: Path, config: Config, num_threads: int) -> Aggregated:
    engine = build_engine(
        model_dir,
        max_num_seqs=config.decode.max_num_seqs,
        max_batched_tokens=config.prefill.max_batched_tokens,
        num_pages=config.kv.decode_pages,
        memory_fraction=config.kv.memory_fraction,
        device=config.model.device,
        dtype=config.model.dtype,
        draft_tokens=config.decode.draft_tokens,
        num_threads=num_threads,
    )
    engine.runner.warm_up(max_batched_tokens=engine.max_batched_tokens, decodes=True)
    return Aggregated(
        engine.runner,
        KVManager(engine.pool.num_pages, prefix_cache=config.kv.prefix_cache),
        num_slots=config.decode.max_num_seqs,
        max_batched_tokens=engine.max_batched_tokens,
        max_model_len=engine.max_model_len,
        drafting=Drafting(engine.draft_tokens, engine.runner.step_s) if engine.draft_tokens else None,
    )


def _wave(loop: Aggregated, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> list[TimedAnswer]:
    begin_s = time.perf_counter()
    for index, prompt in enumerate(prompts):
        loop.add(
            Job(
                job_id=f"wave-{index}",
                token_ids=list(prompt),
                num_prompt_tokens=len(prompt),
                sampling=SamplingParams(temperature=0.0),
                max_new_tokens=num_new_tokens,
                deadline_s=float("inf"),
            )
        )
    times: dict[str, list[float]] = {f"wave-{index}": [] for index in range(len(prompts))}
    tokens: dict[str, list[int]] = {job_id: [] for job_id in times}
    while loop.has_work:
        events = loop.step(0.0).events
        now_s = time.perf_counter() - begin_s
        for event in events:
            times[event.sequence.job_id].append(now_s)
            tokens[event.sequence.job_id].append(event.token_id)
    return [TimedAnswer(each[0], each[-1], tokens[job_id]) for job_id, each in times.items()]
