"""Real workers without a router, each in a process of its own, and a client that asks them as a router does.

    spawned -> loading -> listening -> asked ... -> ended with its parent at the latest

A client speaks the workers' messages over their sockets and notes when each token came. It wants every answer whole: a job that
fails or is pre-empted ends the measurement.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from serving.cluster.process import end_with_parent
from serving.cluster.rank import build_worker
from serving.core.errors import BatonError, StartupError
from serving.core.messages import DecodeJob, JobFailed, JobTokens, PeerAddress, Preempted, PrefillJob, TokenBatch
from serving.core.request import SamplingParams
from serving.core.spec import WorkerSpec
from serving.mailbox import Mailbox, PeerGone, Received
from serving.metrics import Metrics

_LOAD_TIMEOUT_S = 300.0
_BUDGET_S = 600.0
_GREEDY = SamplingParams(temperature=0.0)


class WorkerProcess:
    """One worker. It starts to load on entry; `address` waits until it listens."""

    def __init__(self, spec: WorkerSpec, *, gpu: int | None) -> None:
        """`gpu`: the only one that it sees; None: it sees what we see."""
        context = multiprocessing.get_context("spawn")
        self._pipe, self._other = context.Pipe(duplex=False)
        arguments = (self._other, os.getpid(), spec, gpu)
        self._process = context.Process(target=_live, args=arguments, name=spec.worker_id, daemon=True)
        self._address: PeerAddress | None = None

    @property
    def address(self) -> PeerAddress:
        """Raises StartupError with what the worker said, or that it took too long."""
        if self._address is None:
            answer = self._answer()
            if not isinstance(answer, PeerAddress):
                raise StartupError(f"{self._process.name} does not start: {answer}")
            self._address = answer
        return self._address

    def __enter__(self) -> WorkerProcess:
        self._process.start()
        self._other.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _answer(self) -> object:
        try:
            return self._pipe.recv() if self._pipe.poll(_LOAD_TIMEOUT_S) else f"nothing for {_LOAD_TIMEOUT_S:g} s"
        except EOFError:
            return "its process has ended; its own message says why"


def _live(pipe: Connection, parent_pid: int, spec: WorkerSpec, gpu: int | None) -> None:
    end_with_parent(parent_pid, signal.SIGKILL)
    os.environ["UCX_NET_DEVICES"] = "lo"  # as under `baton serve`: everything is on this host
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)  # before anything asks CUDA; as Ray does for a rank
    try:
        worker = build_worker(spec)
    except BatonError as error:
        pipe.send(str(error))
        return
    pipe.send(worker.address)
    worker.run()


@dataclass(slots=True, eq=False)
class Answer:
    """What one prompt brought. Times are of `time.perf_counter`, one a token; `stages` are the workers' own, in seconds."""

    asked_s: float
    num_wanted: int
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    held: list[tuple[float, list[int]]] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.token_ids) >= self.num_wanted

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.asked_s

    @property
    def gap_s(self) -> float:
        """From the first token to the second: the hand-off and a step."""
        return self.times_s[1] - self.times_s[0]

    def tpot_s(self, first: int = 1) -> float:
        """From token `first` (counted from 0) to the last, a token."""
        return (self.times_s[-1] - self.times_s[first]) / (len(self.times_s) - 1 - first)

    def steps_s(self, first: int = 1) -> list[float]:
        """Time of each token after token `first`, since the one before."""
        return [self.times_s[i + 1] - self.times_s[i] for i in range(first, len(self.times_s) - 1)]


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where a prompt is sent. `decode` None: `prefill` is of role `both` and goes on by itself."""

    prefill: PeerAddress
    decode: PeerAddress | None


class Client:
    """Greedy answers of fixed length. Belongs to one thread."""

    def __init__(self, secret: bytes, routes: Sequence[Route]) -> None:
        self._answers: dict[str, tuple[Answer, str]] = {}
        self._num_jobs = 0
        self._mailbox: Mailbox[Any] = Mailbox(
            worker_id="bench",
            incarnation=1,
            host="127.0.0.1",
            secret=secret,
            heartbeat_s=0.75,
            metrics=Metrics("worker", worker="bench"),
        )
        self._mailbox.start()
        for route in routes:
            for address in (route.prefill, route.decode):
                if address is not None:
                    self._mailbox.connect(address)

    def ask(self, route: Route, prompt: Sequence[int], num_new_tokens: int) -> Answer:
        """Returns at once; `wait` lets it go on."""
        assert num_new_tokens > 1, "with one token nothing is handed off"
        self._num_jobs += 1
        job_id = f"bench.{self._num_jobs}"
        answer = Answer(time.perf_counter(), num_new_tokens)
        self._answers[job_id] = (answer, route.prefill.worker_id)
        fields: dict[str, Any] = {
            "job_id": job_id,
            "token_ids": list(prompt),
            "num_prompt_tokens": len(prompt),
            "sampling": _GREEDY,
            "max_new_tokens": num_new_tokens,
            "budget_s": _BUDGET_S,
        }
        if route.decode is not None:
            self._mailbox.post(route.decode.worker_id, DecodeJob(**fields))
        self._mailbox.post(route.prefill.worker_id, PrefillJob(**fields, decode=route.decode))
        return answer

    def wait(self, until: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Takes what comes until `until` holds. Raises BatonError if a job fails, a worker goes or time is up."""
        end_s = time.monotonic() + timeout_s
        while not until():
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                raise BatonError(f"no answer within {timeout_s:g} s; {len(self._answers)} are open")
            for event in self._mailbox.get(min(left_s, 1.0)):
                self._take(event, time.perf_counter())

    def close(self) -> None:
        self._mailbox.close()

    def _take(self, event: object, now_s: float) -> None:
        if isinstance(event, PeerGone):
            raise BatonError(f"{event.reason}; its own message says why")
        message = event.message if isinstance(event, Received) else None
        match message:
            case TokenBatch():
                assert isinstance(event, Received)
                for news in message.jobs:
                    self._on_tokens(event.sender, news, message.stages.get(news.job_id, {}), now_s)
            case JobFailed():
                raise BatonError(f"job {message.job_id} has failed: {message.reason}")
            case Preempted():
                raise BatonError(f"job {message.job_id} was pre-empted; raise kv.decode_pages")
            case _:
                pass

    def _on_tokens(self, sender: str, news: JobTokens, stages: dict[str, float], now_s: float) -> None:
        answer, prefill = self._answers[news.job_id]
        answer.stages |= stages
        answer.held.append((now_s, news.token_ids))
        if not answer.token_ids and sender != prefill:
            return  # the first token comes by another socket, and first
        if not answer.token_ids:
            answer.held.insert(0, answer.held.pop())
        for when_s, token_ids in answer.held:
            answer.token_ids += token_ids
            answer.times_s += [when_s] * len(token_ids)
        answer.held.clear()
        if answer.done:
            del self._answers[news.job_id]
