"""`baton demo`: a server, one question over a text, the answer as it comes, what it took, whether it is right, and nothing left behind.

The question hides a fact in a text of several pages of latents, drawn anew each time: an answer can be right only if the whole prompt went
through prefill, hand-off and decode unharmed.
"""

from __future__ import annotations

import secrets
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from openai import OpenAI, OpenAIError

from serving.cluster.served import ServedProcess
from serving.core.errors import BatonError
from serving.demo.questions import Question, needle

_TEXT_WORDS = 300
_HANDOFF = "baton_kv_handoff_bytes_total{"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came, and when: seconds from sending the request."""

    text: str
    num_tokens: int
    ttft_s: float
    total_s: float

    @property
    def tpot_s(self) -> float:
        return (self.total_s - self.ttft_s) / max(self.num_tokens - 1, 1)


def run_demo(server_arguments: Sequence[str], *, seed: int | None = None) -> int:
    """0: the answer is right. `seed` None draws one. Raises BatonError if the server does not come up or does not answer."""
    seed = secrets.randbelow(2**32) if seed is None else seed
    rng = Random(f"demo/{seed}")
    question = needle(rng, _TEXT_WORDS, rng.random(), lambda text: len(text.split()))
    with ServedProcess(server_arguments) as server:
        text = str(question.openai_messages()[0]["content"])
        print(f"\n{text}\n\n> ", end="", flush=True)
        try:
            answer = _ask(server.url, question)
        except OpenAIError as error:
            raise BatonError(f"the server did not answer: {error}") from error
        print("\n")
        _report(answer, handoff_bytes(server.url))
    right = question.accepts(answer.text)
    print(
        f"the answer is right: it names {question.needed}"
        if right
        else f"the answer is WRONG: it should name {question.needed} (seed {seed})"
    )
    return 0 if right else 1


def _ask(url: str, question: Question) -> Answer:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    messages: Any = question.openai_messages()
    model = client.models.list().data[0].id
    started_s = time.perf_counter()
    ttft_s, parts, num_tokens = 0.0, [], 0
    with client.chat.completions.create(
        model=model,
        messages=messages,
        stream=True,
        stream_options={"include_usage": True},
        temperature=0,
        max_tokens=64,
    ) as stream:
        for chunk in stream:
            if chunk.usage is not None:
                num_tokens = chunk.usage.completion_tokens
            if chunk.choices and (part := chunk.choices[0].delta.content):
                ttft_s = ttft_s or time.perf_counter() - started_s
                parts.append(part)
                print(part, end="", flush=True)
    return Answer(text="".join(parts), num_tokens=num_tokens, ttft_s=ttft_s, total_s=time.perf_counter() - started_s)


def handoff_bytes(url: str) -> dict[str, int]:
    """Bytes handed from prefill to decode by kind, over all workers, from the server's /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    total: dict[str, int] = {}
    for line in lines:
        if line.startswith(_HANDOFF):
            kind = line.split('kind="')[1].split('"')[0]
            total[kind] = total.get(kind, 0) + int(float(line.rsplit(" ", 1)[1]))
    return total


def _report(answer: Answer, handed: dict[str, int]) -> None:
    print(f"TTFT  {answer.ttft_s * 1000:8.1f} ms")
    print(f"TPOT  {answer.tpot_s * 1000:8.1f} ms   ({answer.num_tokens} tokens in {answer.total_s:.2f} s)")
    for kind, num_bytes in handed.items():
        print(f"handed off  {num_bytes:12,d} bytes  {kind}")
    sys.stdout.flush()
