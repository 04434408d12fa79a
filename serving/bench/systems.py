"""What can be measured: this engine and its peers, behind one method.

A system gets prompts of token ids and returns the new tokens of each, greedy, never stopping early. How long that takes
is measured outside. A peer is imported only when it is asked for; one of another installation is `serving.bench.foreign`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from kvcache.layout import num_pages_for
from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.core.errors import ConfigError
from serving.core.request import SamplingParams
from serving.engine.build import build_engine


class System(Protocol):
    """`name` and `version` as they stand in reports."""

    name: str
    version: str

    def generate(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> list[list[int]]: ...


class Baton:
    """Prefill and decode over one engine, run-ahead on; no prefix cache, so that a repeat computes everything again."""

    name = "baton"

    def __init__(
        self, model_dir: Path, *, dtype: str, device: str, max_num_seqs: int, max_tokens: int, max_batched_tokens: int
    ) -> None:
        self.version = importlib.metadata.version("baton-serving")
        num_pages = max_num_seqs * num_pages_for(max_tokens)
        engine = build_engine(
            model_dir,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            num_pages=num_pages,
            max_model_len=max_tokens,
            dtype=dtype,
            device=device,
        )
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
