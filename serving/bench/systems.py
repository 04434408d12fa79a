"""What can be measured: this engine and its peers, behind one method.

A system gets prompts of token ids and returns the new tokens of each, greedy, never stopping early. How long that takes
is measured outside. A peer is imported only when it is asked for; one of another installation is `serving.bench.foreign`.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from kvcache.layout import num_pages_for
from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.core.config import load_config
from serving.core.errors import ConfigError
from serving.core.request import SamplingParams
from serving.core.request import Sequence as Job
from serving.engine.build import build_engine
from serving.model.deepseek_v3 import DeepseekV3


class System(Protocol):
    """`name` and `version` as they stand in reports."""

    name: str
    version: str

    def generate(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> list[list[int]]: ...


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a system wrote, and its steps: seconds from the beginning until each ended, and which brought each text's last token."""

    token_ids: list[list[int]]
    steps_s: list[float]
    last_steps: list[int]


class TimedSystem(System, Protocol):
    """Prompts of one length, a token a step of each sequence from its first one on."""

    def timed(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> Run: ...


class Baton:
    """Prefill and decode over one engine, run-ahead on; no prefix cache, so that a repeat computes everything again."""

    name = "baton"

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: str,
        device: str,
        max_num_seqs: int,
        max_tokens: int,
        max_batched_tokens: int,
        kernels: str = "",
    ) -> None:
        """`kernels`: a setting of that table, as `--set` takes one, which the system is then called by."""
        if kernels:
            self.name = f"baton {kernels}"
        # None: run from its folder, on a machine where nothing is installed.
        self.version = installed_version("baton-serving") or "not installed"
        num_pages = max_num_seqs * num_pages_for(max_tokens)
        engine = build_engine(
            model_dir,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            num_pages=num_pages,
            max_model_len=max_tokens,
            dtype=dtype,
            device=device,
            kernels=load_config(overrides=[kernels] if kernels else []).kernels,
        )
        assert isinstance(engine.runner.model, DeepseekV3)
        self.kernels = engine.runner.model.kernels.names()
        engine.runner.warm_up(max_batched_tokens=engine.max_batched_tokens, decodes=True)
        self._loop = Aggregated(
            engine.runner,
            KVManager(num_pages, prefix_cache=False),
            num_slots=max_num_seqs,
            max_batched_tokens=engine.max_batched_tokens,
            max_model_len=engine.max_model_len,
        )

    def generate(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> list[list[int]]:
        return self._loop.generate(prompts, SamplingParams(temperature=0.0), num_new_tokens)

    def timed(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> Run:
        texts: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
        last_steps: dict[str, int] = {}
        steps_s: list[float] = []
        begin = time.perf_counter()
        for job_id, prompt in zip(texts, prompts, strict=True):
            self._loop.add(
                Job(
                    job_id=job_id,
                    token_ids=list(prompt),
                    num_prompt_tokens=len(prompt),
                    sampling=SamplingParams(temperature=0.0),
                    max_new_tokens=num_new_tokens,
                    deadline_s=float("inf"),
                )
            )
        while self._loop.has_work:
            events = self._loop.step(0.0).events
            if events:
                steps_s.append(time.perf_counter() - begin)
            for event in events:
                texts[event.sequence.job_id].append(event.token_id)
                last_steps[event.sequence.job_id] = len(steps_s) - 1
        return Run(token_ids=list(texts.values()), steps_s=steps_s, last_steps=[last_steps[job_id] for job_id in texts])


class Transformers:
    """`generate` with its KV cache, prompts of one length as one batch."""

    name = "transformers"

    def __init__(self, model_dir: Path, *, dtype: str, device: str) -> None:
        try:
            import transformers
        except ImportError:
            raise ConfigError("--peer transformers: the package is not installed; run `make install`") from None
        self.version: str = transformers.__version__
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
        self._model.eval().to(device)
        # Random models draw the end of the sequence as any other token.
        self._model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> list[list[int]]:
        token_ids = torch.tensor([list(prompt) for prompt in prompts], device=self._model.device)
        out = self._model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=num_new_tokens,
            min_new_tokens=num_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        new: list[list[int]] = out[:, token_ids.shape[1] :].tolist()
        return new


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
