"""Factories of router tests: a model folder of bytes, a scripted cluster, and the application on top of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from router.__main__ import load_served
from router.build import Router, build_router
from router.openai.prepare import Served
from serving.core.config import Config, TelemetryTable
from serving.text import markers as m
from serving.text.tokenizer import byte_alphabet
from serving.wire import Codec
from tests.unit.router.scripted_worker import EOS, SECRET, ScriptedCluster, ScriptedWorker

CONTROL = (
    *(m.BOS, m.EOS, m.USER, m.ASSISTANT, m.THINK, m.END_THINK, m.CALLS_BEGIN, m.CALLS_END, m.CALL_BEGIN, m.CALL_END),
    *(m.OUTPUTS_BEGIN, m.OUTPUTS_END, m.OUTPUT_BEGIN, m.OUTPUT_END, m.SEP),
)
CONTROL_ID = {name: 256 + n for n, name in enumerate(CONTROL)}
MAX_POSITIONS = 2048


def write_model_folder(folder: Path) -> Path:
    """Tokens 0 to 255 are the bytes, in the order of the byte alphabet, then the control tokens. No weights."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [
        {"id": i, "content": name, "special": name in (m.BOS, m.EOS), "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for name, i in CONTROL_ID.items()
    ]
    vocab = {char: n for n, char in enumerate(byte_alphabet())}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    template = f"{m.BOS}{m.USER}{m.ASSISTANT}"
    config = {"bos_token": m.BOS, "eos_token": m.EOS, "chat_template": template}
    model = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "eos_token_id": EOS,
        "bos_token_id": 256,
        "max_position_embeddings": MAX_POSITIONS,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps(model))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("models") / "bytes")


@pytest.fixture(scope="session")
def served(model_folder: Path) -> Served:
    return load_served(str(model_folder), Config().model)


def byte_ids(text: str) -> list[int]:
    """Ids of the bytes of `text`."""
    alphabet = byte_alphabet()
    by_byte = {byte: n for n, byte in enumerate(alphabet.values())}
    return [by_byte[byte] for byte in text.encode()]


def saying(text: str, *, eos: bool = True) -> Callable[[list[int]], list[int]]:
    """A script that always says `text`."""
    ids = byte_ids(text) + ([EOS] if eos else [])
    return lambda prompt_ids: ids


@dataclass(frozen=True, kw_only=True)
class Front(Router):
    """A router in this event loop, on top of a scripted cluster."""

    client: httpx.AsyncClient
    cluster: ScriptedCluster

    async def until(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, "it did not happen in time"
            await asyncio.sleep(0.005)

    def ended(self, outcome: str) -> float:
        return self.metrics.value("baton_requests_total", outcome=outcome)


def make_front(served: Served, cluster: ScriptedCluster, config: Config) -> Front:
    router = build_router(config, served, Codec(SECRET, "router-1", 1), directory=cluster.endpoint)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(router.app), base_url="http://router", timeout=10.0)
    return Front(**vars(router), client=client, cluster=cluster)


@pytest.fixture
def front(served: Served) -> Callable[..., contextlib.AbstractAsyncContextManager[Front]]:
    """front(script, workers=..., **router options): an async context manager, entered when the workers are usable."""

    @contextlib.asynccontextmanager
    async def make(
        script: Callable[[list[int]], list[int]],
        workers: list[ScriptedWorker] | None = None,
        **options: Any,
    ) -> AsyncIterator[Front]:
        if workers is None:
            workers = [ScriptedWorker("prefill-0", "prefill"), ScriptedWorker("decode-0", "decode")]
        config = Config(
            router=dataclasses.replace(Config().router, **options), telemetry=TelemetryTable(heartbeat_s=0.1)
        )
        with ScriptedCluster(script, workers) as cluster:
            made = make_front(served, cluster, config)
            made.fleet.start(made.dispatcher)
            try:
                await made.until(lambda: sum(w.usable for w in made.view) == sum(w.ready for w in workers))
                yield made
            finally:
                await made.client.aclose()
                made.fleet.close()

    return make


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "bytes", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, **fields}
