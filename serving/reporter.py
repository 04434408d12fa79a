"""What a worker says of itself: its state to attached routers, its metrics to whoever asks, its progress to everybody.

Owned by the step loop. A state is sent at once to a router that attaches, then whenever it has changed, at most every
STATE_INTERVAL_S. An announced step time is a guess from the steps before; the first steps of a worker are given
FIRST_STEP_S. Of two steps in flight the second begins when the first has ended, and is announced until it has ended too.
Knows no jobs: the worker hands in a function that measures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from serving.core.messages import JobFailed, JobTokens, MetricsQuery, MetricsReply, TokenBatch, WorkerState
from serving.mailbox import Mailbox, PeerGone
from serving.metrics import Metrics

STATE_INTERVAL_S = 0.1
FIRST_STEP_S = 10.0
_FORGET = 0.9


class Reporter:
    """`measure` is called whenever the state may have changed; it must be cheap."""

    def __init__(self, mailbox: Mailbox[Any], metrics: Metrics, measure: Callable[[float], WorkerState]) -> None:
        self._mailbox = mailbox
        self._metrics = metrics
        self._measure = measure
        self._attached: set[str] = set()
        self._sent: WorkerState | None = None
        self._sent_s = 0.0
        self._touched = False
        self._step_s = 0.0
        self._token_s = 0.0
        self._in_flight: deque[tuple[int, float]] = deque()
        """Tokens of each step, and when it was launched."""
        self._settled_s = 0.0

    def touch(self) -> None:
        """Something happened that may have changed the state."""
        self._touched = True

    def attach(self, peer: str) -> None:
        state = self._state()
        if not self._attached:
            self._sent = state
        self._attached.add(peer)
        self._mailbox.post(peer, state)

    def gone(self, event: PeerGone) -> None:
        self._attached.discard(event.peer)

    def answer(self, peer: str, query: MetricsQuery) -> None:
        self._state()
        self._mailbox.post(peer, MetricsReply(query_id=query.query_id, exposition=self._metrics.exposition()))

    def fail(self, router: str, job_id: str, reason: str, *, retryable: bool, overloaded: bool = False) -> None:
        """The end of a job that its router must hear of."""
        self._mailbox.post(router, JobFailed(job_id=job_id, reason=reason, retryable=retryable, overloaded=overloaded))

    def tokens(self, news: Iterable[tuple[str, JobTokens, dict[str, float]]]) -> None:
        """What one step brought: router, new tokens of a job, seconds of the stages that ended with them. One message a router."""
        jobs: dict[str, list[JobTokens]] = {}
        stages: dict[str, dict[str, dict[str, float]]] = {}
        for router, tokens, ended in news:
            jobs.setdefault(router, []).append(tokens)
            if ended:
                stages.setdefault(router, {})[tokens.job_id] = ended
        for router, batch in jobs.items():
            self._mailbox.post(router, TokenBatch(jobs=batch, stages=stages.get(router, {})))

    def launched(self, num_tokens: int, now_s: float) -> None:
        """A step of so many tokens starts, behind those in flight: announce how long they may take."""
        self._in_flight.append((num_tokens, now_s))
        self._announce()

    def settled(self, now_s: float) -> None:
        """The oldest step in flight has ended."""
        num_tokens, launched_s = self._in_flight.popleft()
        took_s = now_s - max(launched_s, self._settled_s)
        self._settled_s = now_s
        self._metrics.observe("baton_step_seconds", took_s)
        fresh = self._step_s == 0.0
        self._step_s = took_s if fresh else _FORGET * self._step_s + (1 - _FORGET) * took_s
        token_s = took_s / max(1, num_tokens)
        self._token_s = token_s if fresh else _FORGET * self._token_s + (1 - _FORGET) * token_s
        self._announce()
        self.touch()

    def tick(self, now_s: float) -> None:
        """Sends the state if it is time and it has changed."""
        if not self._touched or now_s < self._sent_s + STATE_INTERVAL_S:
            return
        state = self._state()
        changed = state != self._sent
        self._sent, self._sent_s, self._touched = state, now_s, False
        for peer in self._attached if changed else ():
            self._mailbox.post(peer, state)

    def due_s(self) -> float | None:
        """When `tick` has something to do; None: not before something happens."""
        return self._sent_s + STATE_INTERVAL_S if self._touched else None

    def _state(self) -> WorkerState:
        state = self._measure(self._step_s)
        for page_state, count in state.page_states.items():
            self._metrics.set("baton_kv_pages", count, state=page_state)
        self._metrics.set("baton_requests_running", state.num_running, role=state.role)
        self._metrics.set("baton_requests_waiting", state.num_waiting, role=state.role)
        return state

    def _announce(self) -> None:
        """What the longest step in flight may take: it may be the one that is waited for."""
        expected_s = 0.0
        if self._in_flight:
            most_tokens = max(num_tokens for num_tokens, _ in self._in_flight)
            expected_s = max(self._step_s, self._token_s * most_tokens) or FIRST_STEP_S
        self._mailbox.progress(expected_s)
