"""The client of the benchmarks: what it reads of a stream, when, and what it makes of many."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator

import pytest

from serving.bench.streams import Stream, ask_all, percentile, rates
from serving.core.errors import BatonError

GAP_S = 0.15


class Scripted(http.server.BaseHTTPRequestHandler):
    """Streams the prompt's tokens one event each, a gap before every one but the first; the second event arrives in two pieces."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["stream"]
        assert body["stream_options"] == {"include_usage": True}
        if body["prompt"] == "wrong":
            self.send_error(400, "wrong")
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        words = body["prompt"].split()
        for index, word in enumerate(words):
            time.sleep(GAP_S if index else 0.0)
            event = b"data: " + json.dumps({"choices": [{"text": word}]}).encode() + b"\n\n"
            for part in (event[:9], event[9:]) if index == 1 else (event,):
                self._chunk(part)
        if not body["prompt"].startswith("cut"):
            usage = {"choices": [], "usage": {"completion_tokens": len(words)}}
            self._chunk(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_wave_runs_its_streams_at_once_and_times_each(url: str) -> None:
    begin_s = time.perf_counter()
    short, long = ask_all(url, [{"prompt": "one two"}, {"prompt": "a b c d"}])
    assert time.perf_counter() - begin_s < 5 * GAP_S, "one after the other would take at least that"
    assert (short.text, short.num_tokens, long.text, long.num_tokens) == ("onetwo", 2, "abcd", 4)
    assert short.first_s < GAP_S
    assert GAP_S * 0.9 < short.tpot_s < 2 * GAP_S
    assert 3 * GAP_S * 0.9 < long.last_s - long.first_s < 5 * GAP_S


@pytest.mark.parametrize(("prompt", "reason"), [("wrong", "answered 400"), ("cut off", "ended early")])
def test_a_stream_that_fails_or_ends_early_is_no_figure(url: str, prompt: str, reason: str) -> None:
    with pytest.raises(BatonError, match=reason):
        ask_all(url, [{"prompt": prompt}])


def test_a_server_that_is_not_there_is_an_error_not_a_hang() -> None:
    with pytest.raises(BatonError):
        ask_all("http://127.0.0.1:9", [{"prompt": "a b"}, {"prompt": "c d"}])


def test_rates_are_of_streams_side_by_side() -> None:
    wave = [Stream(first_s=0.5, last_s=1.5, num_tokens=11, text="")] * 4
    slow = [Stream(first_s=0.5, last_s=2.5, num_tokens=11, text="")] * 4
    figures = rates([wave, wave, slow])
    assert figures.decode_tokens_per_s == pytest.approx(4 / 0.1)
    assert figures.tokens_per_s == pytest.approx(44 / 1.5)
    assert (figures.ttft_p50_s, figures.tpot_p50_s) == pytest.approx((0.5, 0.1))
    assert figures.tpot_p99_s == pytest.approx(0.2)


def test_percentiles_lie_between_ranks() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)
    assert percentile([7.0], 99) == 7.0
