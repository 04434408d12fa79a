"""Streams as a client sees them: many at once, each with the time of its first and its last token.

    prompts -> one wave: all asked at the same moment -> a Stream each -> rates and percentiles over waves

The client is a thread a stream that only notes when bytes came; they are read as events after the wave, so that on a small
machine the measuring costs little. Knows the API, not the server.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from serving.core.errors import BatonError

_TIMEOUT_S = 300.0
_EVENT = b"data: "


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Seconds since the wave began. `num_tokens` at least 2."""

    first_s: float
    last_s: float
    num_tokens: int
    text: str

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.first_s) / (self.num_tokens - 1)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Over all streams of all waves. `decode_tokens_per_s`: streams of a wave over their mean TPOT; `tokens_per_s`: everything
    of a wave over its length, prefill and hand-off included; both medians over waves."""

    decode_tokens_per_s: float
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float


def rates(waves: Sequence[Sequence[Stream]]) -> Rates:
    decode = [len(wave) ** 2 / sum(stream.tpot_s for stream in wave) for wave in waves]
    total = [sum(stream.num_tokens for stream in wave) / max(stream.last_s for stream in wave) for wave in waves]
    ttfts = [stream.first_s for wave in waves for stream in wave]
    tpots = [stream.tpot_s for wave in waves for stream in wave]
    return Rates(
        decode_tokens_per_s=percentile(decode, 50),
        tokens_per_s=percentile(total, 50),
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p99_s=percentile(ttfts, 99),
        tpot_p50_s=percentile(tpots, 50),
        tpot_p99_s=percentile(tpots, 99),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ask_all(url: str, bodies: Sequence[dict[str, Any]]) -> list[Stream]:
    """One wave over /v1/completions, greedy streams of `bodies`. Raises BatonError where a stream fails or ends early."""
    calls = [_Call(url, body | {"stream": True, "stream_options": {"include_usage": True}}) for body in bodies]
    start = threading.Barrier(len(calls) + 1)
    threads = [threading.Thread(target=call.run, args=(start,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):  # a call has not connected, and says so below
        start.wait()
    begin_s = time.perf_counter()
    for thread in threads:
        thread.join()
    return [call.stream(begin_s) for call in calls]


class _Call:
    """One request and what came of it, as (time, bytes)."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self._url = urlsplit(url)
        self._body = json.dumps(body).encode()
        self._status = 0
        self._parts: list[tuple[float, bytes]] = []
        self._fault: Exception | None = None

    def run(self, start: threading.Barrier) -> None:
        """Connected before the start, as a client with a pool would be."""
        connection = http.client.HTTPConnection(self._url.hostname or "", self._url.port, timeout=_TIMEOUT_S)
        try:
            connection.connect()
            start.wait()
            connection.request("POST", "/v1/completions", self._body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            self._status = answer.status
            while part := answer.read1():
                self._parts.append((time.perf_counter(), part))
        except threading.BrokenBarrierError:
            self._fault = BatonError("another stream of the wave did not connect")
        except (OSError, http.client.HTTPException) as error:
            self._fault = error
            start.abort()
        finally:
            connection.close()

    def stream(self, begin_s: float) -> Stream:
        whole = b"".join(part for _, part in self._parts)
        if self._status != 200:
            raise BatonError(f"{self._url.geturl()} answered {self._status}: {self._fault or whole.decode()[:500]}")
        events = [(when_s, json.loads(data)) for when_s, data in _events(self._parts) if data != b"[DONE]"]
        texts = [(when_s, event["choices"][0]["text"]) for when_s, event in events if event["choices"]]
        usage = next((event["usage"] for _, event in reversed(events) if event.get("usage")), None)
        if usage is None or not texts:
            raise BatonError(f"{self._url.geturl()}: the stream ended early: {self._fault or whole[-500:].decode()}")
        return Stream(
            first_s=texts[0][0] - begin_s,
            last_s=texts[-1][0] - begin_s,
            num_tokens=usage["completion_tokens"],
            text="".join(text for _, text in texts),
        )


def _events(parts: Sequence[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """Events with the time of their last byte."""
    events, rest = [], b""
    for when_s, part in parts:
        *complete, rest = (rest + part).split(b"\n\n")
        events += [(when_s, event.removeprefix(_EVENT)) for event in complete]
    return events
