"""What a starting server says where no terminal is."""

from __future__ import annotations

import io

import pytest

from serving.cluster.display import Display
from serving.core.messages import PeerAddress, WorkerInfo


def worker(state: str, detail: str = "") -> WorkerInfo:
    return WorkerInfo(address=PeerAddress("decode-0", "", 1), role="decode", state=state, detail=detail)


def test_a_worker_is_shown_when_it_changes_and_only_then():
    stream = io.StringIO()
    display = Display(stream)
    for state in (worker("starting"), worker("starting"), worker("starting", "importing"), worker("ready", "pid 7")):
        display.workers([state])
    assert stream.getvalue().splitlines() == [
        "baton: decode-0: starting",
        "baton: decode-0: starting, importing",
        "baton: decode-0: ready, pid 7",
    ]


def test_the_ready_line_is_the_promised_one_on_standard_output(capsys: pytest.CaptureFixture[str]):
    Display(io.StringIO()).ready("http://127.0.0.1:8000", 2, 3)
    assert capsys.readouterr().out == "baton: ready on http://127.0.0.1:8000 (2 prefill, 3 decode ranks)\n"
