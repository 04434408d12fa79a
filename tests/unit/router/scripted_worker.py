"""A cluster without engines: workers that speak the real messages over real ZeroMQ sockets and recite a script.

One thread owns the directory and all workers. The script says which tokens answer a prompt; a life goes on where `token_ids` ends, so a
lost or repeated token shows as wrong text. Faults are set by the test: `before_token` of a worker is asked before each token.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from serving.core.messages import (
    Abort,
    AnyMessage,
    Attach,
    DecodeJob,
    Envelope,
    Heartbeat,
    JobFailed,
    JobTokens,
    MetricsQuery,
    MetricsReply,
    PeerAddress,
    Preempted,
    PrefillJob,
    Roster,
    TokenBatch,
    WorkerInfo,
    WorkerState,
)
from serving.core.request import FinishReason, TokenLogprobs
from serving.wire import Codec

SECRET = bytes(range(32))
EOS = 257


@dataclass(eq=False)
class Job:
    """One job on one worker. `next` is the index in the script of the token to come."""

    message: PrefillJob | DecodeJob
    identity: bytes
    next: int
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def job_id(self) -> str:
        return self.message.job_id


@dataclass(eq=False)
class ScriptedWorker:
    """`heard` is every message it got but heartbeats. `before_token(job)` returns preempt, fail, refuse, overload, die, hold or None.

    `num_each`: tokens of a step, fewer in its last.
    """

    worker_id: str
    role: str
    incarnation: int = 1
    num_pages: int = 100
    step_s: float = 0.002
    num_cached: int = 0
    num_each: int = 1
    mute: bool = False
    ready: bool = True
    before_token: Callable[[Job], str | None] = lambda job: None
    heard: list[AnyMessage] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)
    attached: set[bytes] = field(default_factory=set)
    promised: dict[str, int] = field(default_factory=dict)
    landed: dict[str, int] = field(default_factory=dict)
    progress: int = 0
    socket: zmq.Socket[bytes] | None = None
    address: PeerAddress | None = None
    codec: Codec | None = None

    def heard_of(self, message_type: type) -> list[AnyMessage]:
        return [message for message in self.heard if isinstance(message, message_type)]


class ScriptedCluster:
    """`script(prompt_ids)` is the whole answer, end-of-sequence included if it has one. Use as a context manager."""

    def __init__(self, script: Callable[[list[int]], list[int]], workers: list[ScriptedWorker]) -> None:
        self.script = script
        self.workers = {worker.worker_id: worker for worker in workers}
        self.endpoint = ""
        # Everybody's, and never ended: once in some thousand times libzmq waits for ever for sockets that are closed.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._codec = Codec(SECRET, "directory", 1)
        self._directory = self._context.socket(zmq.ROUTER)
        self._routers: set[bytes] = set()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._calls: list[Callable[[], None]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.beat_s = 0.2

    def __enter__(self) -> ScriptedCluster:
        port = self._directory.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        for worker in self.workers.values():
            self._open(worker)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5.0)
        assert not self._thread.is_alive()
        self._directory.close(linger=0)
        for worker in self.workers.values():
            if worker.socket is not None:
                worker.socket.close(linger=0)

    # -- what a test does to it -----------------------------------------------------------------------------------------

    def kill(self, worker_id: str, *, announce: bool = True) -> None:
        """The process is gone. `announce`: the supervisor notices; else only silence tells."""
        self._do(lambda: self._kill(self.workers[worker_id], announce))

    def restart(self, worker_id: str) -> ScriptedWorker:
        """Another life with its own address."""
        old = self.workers[worker_id]
        new = ScriptedWorker(
            worker_id, old.role, old.incarnation + 1, old.num_pages, old.step_s, before_token=old.before_token
        )

        def replace() -> None:
            self._kill(old, announce=False)
            self.workers[worker_id] = new
            self._open(new)
            self._send_roster()

        self._do(replace)
        return new

    def lose_directory(self) -> None:
        """Nobody answers there any more; the workers live on."""
        self._do(lambda: self._directory.unbind(self.endpoint))

    def raw(self, worker_id: str, frame: bytes) -> None:
        """Bytes to every router, as if from this worker."""
        worker = self.workers[worker_id]
        self._do(lambda: [self._send_frame(worker, identity, frame) for identity in worker.attached])

    def post(self, worker_id: str, message: AnyMessage) -> None:
        worker = self.workers[worker_id]
        self._do(lambda: [self._send(worker, identity, message) for identity in worker.attached])

    @property
    def num_jobs(self) -> int:
        return sum(len(worker.jobs) for worker in self.workers.values())

    def _do(self, call: Callable[[], object]) -> None:
        done = threading.Event()

        def run() -> None:
            call()
            done.set()

        self._calls.append(run)
        assert done.wait(5.0)

    # -- the thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._later(0.0, self._beat)
        while not self._stop.is_set():
            while self._calls:
                self._calls.pop(0)()
            now_s = time.monotonic()
            while self._events and self._events[0][0] <= now_s:
                heapq.heappop(self._events)[2]()
            self._receive()

    def _receive(self) -> None:
        poller = zmq.Poller()
        poller.register(self._directory, zmq.POLLIN)
        sockets = {w.socket: w for w in self.workers.values() if w.socket is not None}
        for socket in sockets:
            poller.register(socket, zmq.POLLIN)
        wait_s = self._events[0][0] - time.monotonic() if self._events else 0.01
        for socket, _ in poller.poll(max(0.0, min(wait_s, 0.01)) * 1000):
            identity, frame = socket.recv_multipart()
            if socket is self._directory:
                self._routers.add(identity)
                if isinstance(self._codec.decode(frame).message, Attach):
                    self._send_roster()
            elif socket in sockets:
                self._on_message(sockets[socket], identity, self._codec.decode(frame))

    def _on_message(self, worker: ScriptedWorker, identity: bytes, envelope: Envelope) -> None:
        message = envelope.message
        if worker.mute or isinstance(message, Heartbeat):
            return
        worker.heard.append(message)
        match message:
            case Attach():
                worker.attached.add(identity)
                self._send_state(worker, identity)
            case PrefillJob():
                self._take(worker, identity, message)
                self._later(worker.step_s, lambda: self._first_token(worker, message.job_id))
            case DecodeJob():
                self._take(worker, identity, message)
                if message.job_id in worker.landed:
                    self._land(worker, message.job_id, worker.landed.pop(message.job_id))
            case Abort():
                self._drop(worker, message.job_id)
            case MetricsQuery():
                text = f'# HELP baton_tokens_total t\n# TYPE baton_tokens_total counter\nbaton_tokens_total{{worker="{worker.worker_id}"}} 1.0\n'
                self._send(worker, identity, MetricsReply(query_id=message.query_id, exposition=text))

    def _take(self, worker: ScriptedWorker, identity: bytes, message: PrefillJob | DecodeJob) -> None:
        emitted = len(message.token_ids) - message.num_prompt_tokens
        worker.jobs[message.job_id] = Job(message, identity, emitted)
        worker.promised[message.job_id] = -(-len(message.token_ids) // 64) + 1

    def _drop(self, worker: ScriptedWorker, job_id: str) -> None:
        worker.jobs.pop(job_id, None)
        worker.promised.pop(job_id, None)
        for identity in worker.attached:
            self._send_state(worker, identity)

    def _first_token(self, worker: ScriptedWorker, job_id: str) -> None:
        job = worker.jobs.get(job_id)
        if job is None or not self._may_go_on(worker, job, self._first_token):
            return
        assert isinstance(job.message, PrefillJob)
        decode = job.message.decode
        job.stages = {"prefill_queue": 0.001, "prefill": 0.002}
        finished = self._emit(worker, job)
        if finished or worker.role == "prefill":
            self._drop(worker, job_id)
        if not finished and decode is not None:
            self._land(self.workers[decode.worker_id], job_id, job.next)
        elif not finished:
            self._later(worker.step_s, lambda: self._next_token(worker, job_id))

    def _land(self, worker: ScriptedWorker, job_id: str, index: int) -> None:
        """The latents are there; the DecodeJob may still be on its way."""
        job = worker.jobs.get(job_id)
        if job is None:
            worker.landed[job_id] = index
            return
        job.next, job.stages = index, {"transfer_exposed": 0.001, "decode_join": 0.001, "first_step": 0.001}
        self._later(worker.step_s, lambda: self._next_token(worker, job_id))

    def _next_token(self, worker: ScriptedWorker, job_id: str) -> None:
        job = worker.jobs.get(job_id)
        if job is None or not self._may_go_on(worker, job, self._next_token):
            return
        if self._emit(worker, job):
            self._drop(worker, job_id)
        else:
            self._later(worker.step_s, lambda: self._next_token(worker, job_id))

    def _may_go_on(self, worker: ScriptedWorker, job: Job, again: Callable[[ScriptedWorker, str], None]) -> bool:
        match worker.before_token(job):
            case None:
                return True
            case "hold":
                self._later(0.01, lambda: again(worker, job.job_id))
            case "preempt":
                self._drop(worker, job.job_id)
                self._send(worker, job.identity, Preempted(job_id=job.job_id))
            case "fail" | "refuse" | "overload" as fault:
                self._drop(worker, job.job_id)
                failed = JobFailed(
                    job_id=job.job_id,
                    reason="scripted fault",
                    retryable=fault == "fail",
                    overloaded=fault == "overload",
                )
                self._send(worker, job.identity, failed)
            case "die":
                self._kill(worker, announce=True)
        return False

    def _emit(self, worker: ScriptedWorker, job: Job) -> bool:
        """Sends the next tokens; True when the last was among them."""
        message = job.message
        answer = self.script(message.token_ids[: message.num_prompt_tokens])
        token_ids: list[int] = []
        finish: FinishReason | None = None
        while finish is None and len(token_ids) < worker.num_each:
            token_ids.append(answer[job.next] if job.next < len(answer) else ord("~"))
            job.next += 1
            made = job.next - (len(message.token_ids) - message.num_prompt_tokens)
            finish = FinishReason.LENGTH if made >= message.max_new_tokens else None
            finish = FinishReason.STOP if token_ids[-1] in message.sampling.stop_token_ids else finish
        wanted = message.sampling.logprobs
        noted = [TokenLogprobs(-0.5, [token_id] * (wanted or 0), [-0.5] * (wanted or 0)) for token_id in token_ids]
        news = JobTokens(
            job_id=job.job_id,
            token_ids=token_ids,
            logprobs=noted if wanted is not None else None,
            finish=finish,
            num_cached_tokens=worker.num_cached,
        )
        worker.progress += 1
        stages, job.stages = job.stages, {}
        self._send(worker, job.identity, TokenBatch(jobs=[news], stages={job.job_id: stages} if stages else {}))
        return finish is not None

    def _beat(self) -> None:
        for worker in self.workers.values():
            for identity in worker.attached:
                self._send(worker, identity, Heartbeat(progress=worker.progress))
        self._later(self.beat_s, self._beat)

    # -- sockets --------------------------------------------------------------------------------------------------------

    def _open(self, worker: ScriptedWorker) -> None:
        worker.socket = self._context.socket(zmq.ROUTER)
        port = worker.socket.bind_to_random_port("tcp://127.0.0.1")
        worker.address = PeerAddress(worker.worker_id, f"tcp://127.0.0.1:{port}", worker.incarnation)
        worker.codec = Codec(SECRET, worker.worker_id, worker.incarnation)

    def _kill(self, worker: ScriptedWorker, announce: bool) -> None:
        if worker.socket is not None:
            worker.socket.close(linger=0)
        worker.socket = None
        worker.jobs.clear()
        worker.attached.clear()
        if announce:
            self._send_roster()

    def _send_roster(self) -> None:
        infos = [
            WorkerInfo(address=w.address, role=w.role, state="ready" if w.socket is not None else "dead")
            for w in self.workers.values()
            if w.address is not None
        ]
        for identity in self._routers:
            self._directory.send_multipart([identity, self._codec.encode(Roster(workers=infos))])

    def _send_state(self, worker: ScriptedWorker, identity: bytes | None = None) -> None:
        credit = worker.num_pages - sum(worker.promised.values())
        state = WorkerState(
            role=worker.role,
            ready=worker.ready,
            draining=False,
            num_running=len(worker.jobs),
            num_waiting=0,
            waiting_work=0,
            num_pages=worker.num_pages,
            credit_pages=credit,
            page_states={},
            step_s=0.001,
        )
        for target in worker.attached if identity is None else (identity,):
            self._send(worker, target, state)

    def _send(self, worker: ScriptedWorker, identity: bytes, message: AnyMessage) -> None:
        assert worker.codec is not None
        self._send_frame(worker, identity, worker.codec.encode(message))

    def _send_frame(self, worker: ScriptedWorker, identity: bytes, frame: bytes) -> None:
        if worker.socket is not None and not worker.mute:
            worker.socket.send_multipart([identity, frame])

    def _later(self, delay_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time.monotonic() + delay_s, next(self._order), call))
