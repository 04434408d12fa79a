"""What the supervisor tells ranks of their nodes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from serving.cluster import supervisor
from serving.cluster.supervisor import on_their_nodes
from serving.core.config import load_config
from serving.core.spec import WorkerSpec
from tests.wire_client import create_spec


@dataclass
class Method:
    """Of an actor; what it answers is there at once."""

    answer: Any
    asked: list[Any] = field(default_factory=list)

    def remote(self, *arguments: Any) -> Any:
        self.asked += arguments
        return self.answer


class Actor:
    def __init__(self, host: str) -> None:
        self.host = Method(host)
        self.listen = Method(4321)


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor.ray, "get", lambda answered: answered)


def told(hosts: list[str]) -> tuple[list[Actor], list[WorkerSpec]]:
    actors = [Actor(host) for host in hosts]
    spec = create_spec("decode-0.0", "decode", load_config())
    specs = [replace(spec, rank=rank, rendezvous="/tmp/of-the-head/decode-0-1-ab") for rank in range(len(hosts))]
    return actors, on_their_nodes(actors, specs)


def test_all_meet_where_rank_0_listens_and_each_is_reached_on_its_own_node() -> None:
    actors, specs = told(["10.0.0.7", "10.0.0.7", "10.0.0.8"])
    assert [spec.host for spec in specs] == ["10.0.0.7", "10.0.0.7", "10.0.0.8"]
    assert {spec.rendezvous for spec in specs} == {"tcp://10.0.0.7:4321/decode-0-1-ab"}
    assert [actor.listen.asked for actor in actors] == [["10.0.0.7"], [], []]


def test_a_rank_alone_meets_nobody() -> None:
    (actor,), (spec,) = told(["10.0.0.9"])
    assert (spec.host, spec.rendezvous, actor.listen.asked) == ("10.0.0.9", "", [])
