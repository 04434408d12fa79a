"""A router for tests: speaks the real messages over real sockets, one object a request, every life of it.

And `WorkerPair`: a prefill and a decode worker in threads of this process, each with an engine of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decode.worker import DecodeWorker
from kvcache.manager import KVManager
from kvcache.transfer.base import Completed, PageSource, PageTarget
from kvcache.transfer.local import LocalFabric
from kvcache.transfer.nixl import NixlSource, NixlTarget
from prefill.worker import PrefillWorker
from serving.core.config import Config, DecodeTable, EngineTable, KVTable, PrefillTable, TelemetryTable, TransferTable
from serving.core.messages import (
    Abort,
    Attach,
    DecodeJob,
    JobFailed,
    JobTokens,
    MetricsQuery,
    MetricsReply,
    PeerAddress,
    Preempted,
    PrefillJob,
    TokenBatch,
    WorkerState,
)
from serving.core.request import FinishReason, SamplingParams
from serving.core.spec import WorkerSpec
from serving.engine.build import Engine
from serving.mailbox import Mailbox, PeerGone, Received
from serving.metrics import Metrics

SECRET = b"t" * 32
GREEDY = SamplingParams(temperature=0.0)


@dataclass(eq=False, repr=False)
class Request:
    """What a client would see, and how often its job had to start again."""

    prompt: list[int]
    sampling: SamplingParams
    max_new_tokens: int
    job_id: str = ""
    token_ids: list[int] = field(default_factory=list)
    held: list[JobTokens] = field(default_factory=list)
    has_first: bool = False
    finish: FinishReason | None = None
    failures: list[str] = field(default_factory=list)
    num_preempted: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    gone: bool = False

    def __repr__(self) -> str:
        tokens = f"{len(self.prompt)} + {len(self.token_ids)}"
        return f"<{self.job_id}: {tokens} tokens, {self.finish}, gone {self.gone}, failures {self.failures}>"

    @property
    def done(self) -> bool:
        return self.gone or self.finish is not None


class WireClient:
    """Attaches to one prefill and one decode worker, or to one of role both (`decode` None)."""

    def __init__(
        self, prefill: PeerAddress, decode: PeerAddress | None, *, name: str = "router-0", max_failures: int = 0
    ) -> None:
        self.prefill, self.decode = prefill, decode
        self.max_failures = max_failures
        self._name = name
        self.states: dict[str, WorkerState] = {}
        self.expositions: dict[str, str] = {}
        self.gone: list[PeerGone] = []
        self._requests: dict[str, Request] = {}
        self._num_jobs = 0
        self.mailbox: Mailbox[object] = Mailbox(
            worker_id=name,
            incarnation=1,
            host="127.0.0.1",
            secret=SECRET,
            heartbeat_s=0.2,
            metrics=Metrics("worker", worker=name),
        )
        self.mailbox.start()
        for address in (prefill, decode):
            if address is not None:
                self.mailbox.connect(address)
                self.mailbox.post(address.worker_id, Attach())

    def submit(self, prompt: Sequence[int], max_new_tokens: int = 8, sampling: SamplingParams = GREEDY) -> Request:
        request = Request(list(prompt), sampling, max_new_tokens)
        self._start(request)
        return request

    def abort(self, request: Request) -> None:
        request.gone = True
        self._requests.pop(request.job_id, None)
        for address in (self.decode, self.prefill):
            if address is not None:
                self.mailbox.post(address.worker_id, Abort(job_id=request.job_id))

    def pump(self, timeout_s: float = 0.05) -> None:
        for event in self.mailbox.get(timeout_s):
            if isinstance(event, Received):
                self._take(event)
            elif isinstance(event, PeerGone):
                self._on_gone(event)

    def finish(self, requests: Sequence[Request], timeout_s: float = 60.0) -> list[list[int]]:
        """Waits until all have ended; their tokens."""
        self.wait(lambda: all(request.done for request in requests), timeout_s)
        return [request.token_ids for request in requests]

    def wait(self, until: Callable[[], bool], timeout_s: float = 10.0) -> None:
        end_s = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < end_s, (
                f"not within {timeout_s} s: {[r for r in self._requests.values() if not r.done]}"
            )
            self.pump()

    def scrape(self) -> dict[str, str]:
        """The metrics of each worker as text, by its id."""
        self.expositions.clear()
        addresses = [address for address in (self.prefill, self.decode) if address is not None]
        for address in addresses:
            self.mailbox.post(address.worker_id, MetricsQuery(query_id=7))
        self.wait(lambda: len(self.expositions) == len(addresses))
        return self.expositions

    def close(self) -> None:
        self.mailbox.close()

    def _start(self, request: Request) -> None:
        self._num_jobs += 1
        request.job_id, request.has_first, request.held = f"{self._name}.{self._num_jobs}", False, []
        self._requests[request.job_id] = request
        num_left = request.max_new_tokens - len(request.token_ids)
        fields: dict[str, Any] = {
            "job_id": request.job_id,
            "token_ids": request.prompt + request.token_ids,
            "num_prompt_tokens": len(request.prompt),
            "sampling": request.sampling,
            "max_new_tokens": num_left,
            "budget_s": 60.0,
        }
        decode = self.decode if num_left > 1 else None
        if decode is not None:
            self.mailbox.post(decode.worker_id, DecodeJob(**fields))
        self.mailbox.post(self.prefill.worker_id, PrefillJob(**fields, decode=decode))

    def _take(self, event: Received) -> None:
        message = event.message
        match message:
            case TokenBatch():
                for news in message.jobs:
                    self._on_tokens(event.sender, news, message.stages.get(news.job_id, {}))
            case Preempted() if message.job_id in self._requests:
                request = self._requests.pop(message.job_id)
                request.num_preempted += 1
                self._start(request)
            case JobFailed() if message.job_id in self._requests:
                self._on_failed(self._requests.pop(message.job_id), message)
            case WorkerState():
                self.states[event.sender] = message
            case MetricsReply():
                self.expositions[event.sender] = message.exposition
            case _:
                pass

    def _on_gone(self, event: PeerGone) -> None:
        """As a router does: nothing that was sent to a dead worker is waited for."""
        self.gone.append(event)
        for request in list(self._requests.values()):
            request.failures.append(event.reason)
            self.abort(request)

    def _on_failed(self, request: Request, message: JobFailed) -> None:
        request.failures.append(message.reason)
        if message.retryable and len(request.failures) <= self.max_failures:
            self._start(request)
        else:
            request.gone = True

    def _on_tokens(self, sender: str, news: JobTokens, stages: dict[str, float]) -> None:
        request = self._requests.get(news.job_id)
        if request is None:
            return
        request.stages |= stages
        if sender != self.prefill.worker_id and not request.has_first:
            request.held.append(news)
            return
        held, request.held, request.has_first = request.held, [], True
        for tokens in [news, *held]:
            request.token_ids += tokens.token_ids
            request.finish = tokens.finish or request.finish
        if request.finish is not None:
            del self._requests[news.job_id]
            if self.decode is not None and sender == self.prefill.worker_id and not held:
                self.mailbox.post(self.decode.worker_id, Abort(job_id=news.job_id))


def create_config(
    *,
    checksum: str = "all",
    max_batched_tokens: int = 128,
    max_num_seqs: int = 32,
    prefix_cache: bool = True,
    expected_new_tokens: int = 256,
    progress_timeout_s: float = 10.0,
) -> Config:
    return Config(
        prefill=PrefillTable(max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens),
        decode=DecodeTable(max_num_seqs=max_num_seqs),
        kv=KVTable(prefix_cache=prefix_cache, expected_new_tokens=expected_new_tokens),
        engine=EngineTable(),
        transfer=TransferTable(checksum=checksum, progress_timeout_s=progress_timeout_s),
        telemetry=TelemetryTable(heartbeat_s=0.2),
    )


def create_spec(
    worker_id: str, role: str, config: Config, *, incarnation: int = 1, model_dir: str | Path = ""
) -> WorkerSpec:
    return WorkerSpec(
        worker_id=worker_id,
        role=role,
        incarnation=incarnation,
        host="127.0.0.1",
        secret=SECRET,
        model_dir=str(model_dir),
        num_threads=1,
        config=config,
    )


class Running:
    """A worker's `run` in a thread; `close` re-raises what it raised."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.worker.stop()
        self.join(20.0)

    def join(self, timeout_s: float) -> None:
        """Waits for `run` to return; raises what it raised, once."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the worker does not stop"
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        try:
            self.worker.run()
        except BaseException as error:
            self.error = error


class WrappedSource:
    """A PageSource like the one inside; tests change a method."""

    def __init__(self, source: PageSource) -> None:
        self._source = source

    @property
    def num_open(self) -> int:
        return self._source.num_open

    @property
    def pause_s(self) -> float:
        return self._source.pause_s

    def connect(self, agent: bytes) -> str:
        return self._source.connect(agent)

    def disconnect(self, peer: str) -> None:
        self._source.disconnect(peer)

    def write(
        self, peer: str, source_page_ids: Sequence[int], target_page_ids: Sequence[int], notification: bytes
    ) -> int:
        return self._source.write(peer, source_page_ids, target_page_ids, notification)

    def poll(self) -> list[Completed]:
        return self._source.poll()

    def close(self) -> None:
        self._source.close()


class WorkerPair:
    """Prefill and decode workers over two engines; pages are NaN again as soon as they are free."""

    def __init__(
        self,
        prefill_engine: Engine,
        decode_engine: Engine,
        *,
        backend: str = "nixl",
        config: Config | None = None,
        run_ahead: bool = False,
        wrap_source: Callable[[PageSource], PageSource] = lambda source: source,
        num_decode_pages: int | None = None,
    ) -> None:
        config = config or create_config()
        source: PageSource
        target: PageTarget
        if backend == "local":
            fabric = LocalFabric()
            source, target = fabric.source(prefill_engine.pool), fabric.target("decode", decode_engine.pool)
        else:
            source = NixlSource("prefill-0.test", prefill_engine.pool)
            target = NixlTarget("decode-0.test", decode_engine.pool)
        self.prefill = PrefillWorker(
            create_spec("prefill-0", "prefill", config),
            engine=prefill_engine,
            manager=create_manager(prefill_engine, config),
            source=wrap_source(source),
            run_ahead=run_ahead,
        )
        self.decode = DecodeWorker(
            create_spec("decode-0", "decode", config),
            engine=decode_engine,
            manager=create_manager(decode_engine, config, num_decode_pages),
            target=target,
            run_ahead=run_ahead,
        )
        self._running = [Running(self.prefill), Running(self.decode)]
        self.client = WireClient(self.prefill.address, self.decode.address)

    def is_quiet(self) -> bool:
        """Every page of both workers is free or cached."""
        return all(
            pages["free"] + pages["cached"] == sum(pages.values())
            for pages in (self.prefill.pages(), self.decode.pages())
        )

    def close(self) -> None:
        self.client.close()
        for running in self._running:
            running.close()


def create_manager(engine: Engine, config: Config, num_pages: int | None = None) -> KVManager:
    pages = engine.pool.num_pages if num_pages is None else num_pages
    engine.pool.poison_all()
    return KVManager(pages, prefix_cache=config.kv.prefix_cache, on_free=engine.pool.poison)
