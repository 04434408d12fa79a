"""The groups of a unit's ranks on GPUs of several nodes: which there are, and what dispatches prefill's steps and decode's."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from serving.core.config import load_config
from serving.engine.joining import join, parallel_of
from serving.model.parallel import Parallel
from serving.model.published import DEEPSEEK_V3
from serving.model.units import shape_of
from serving.parallel.collectives import Collectives, SingleRank
from serving.parallel.dispatch import DirectDispatch, FixedDispatch, HierarchicalDispatch
from tests.wire_client import create_spec

Opened = list[tuple[str, tuple[int, ...]]]


def joined(rank: int, *keys: str, by_nodes: bool, captures: bool, queues: bool = False) -> tuple[Parallel, Opened]:
    shape = shape_of(load_config(overrides=[f"decode.{key}" for key in keys]).decode, DEEPSEEK_V3)
    opened: Opened = []

    def group_of(name: str, ranks: Sequence[int]) -> Collectives:
        opened.append((name, tuple(ranks)))
        return SingleRank(ranks=tuple(ranks))

    ways = {"by_nodes": by_nodes, "queues": queues, "captures": captures}
    return parallel_of(shape, rank, DEEPSEEK_V3, group_of, **ways), opened


PAPER = ("tp=4", "dp=8", "redundant_experts=32")
TP = ("tp", (8, 9, 10, 11))
EP = ("ep", tuple(range(32)))
RAIL, NODE = ("rail", (1, 9, 17, 25)), ("node", tuple(range(8, 16)))


def test_prefill_goes_by_nodes_and_captures_nothing() -> None:
    parallel, opened = joined(9, *PAPER, by_nodes=True, captures=False)
    assert opened == [TP, RAIL, NODE]
    assert isinstance(parallel.experts, HierarchicalDispatch)
    assert parallel.fixed is None


def test_where_groups_are_queues_counts_and_what_returns_have_their_own() -> None:
    """Else they would wait for the rows of another micro-batch."""
    parallel, opened = joined(9, *PAPER, by_nodes=True, captures=False, queues=True)
    apart = [(f"{prefix}-{name}", ranks) for prefix in ("counts", "back") for name, ranks in (RAIL, NODE)]
    assert opened == [TP, *apart, RAIL, NODE]
    assert isinstance(parallel.experts, HierarchicalDispatch)


def test_decode_goes_from_rank_to_rank() -> None:
    parallel, opened = joined(9, *PAPER, by_nodes=False, captures=True)
    assert opened == [TP, EP]
    assert isinstance(parallel.experts, DirectDispatch)
    assert parallel.fixed is not None
    assert isinstance(parallel.fixed(4), FixedDispatch)


def test_a_unit_that_does_both_has_a_way_for_each() -> None:
    parallel, opened = joined(9, *PAPER, by_nodes=True, captures=True)
    assert opened == [TP, EP, RAIL, NODE]
    assert isinstance(parallel.experts, HierarchicalDispatch)
    assert parallel.fixed is not None
    assert isinstance(parallel.fixed(4), FixedDispatch)


def test_what_listens_for_a_unit_that_joins_nothing_is_closed() -> None:
    spec = create_spec("decode-0.0", "decode", load_config(overrides=["decode.dp=2", "decode.ep=1"]), model_dir=Path())
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    with socket.create_connection(address):
        pass
    place = join(dataclasses.replace(spec, listener=listener.detach()), DEEPSEEK_V3, torch.device("cpu"))
    assert place.lockstep is None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


@pytest.mark.parametrize("captures", [False, True])
def test_on_one_node_there_are_no_others_to_go_by(captures: bool) -> None:
    parallel, opened = joined(1, "dp=8", by_nodes=True, captures=captures)
    assert opened == [("ep", tuple(range(8)))]
    assert isinstance(parallel.experts, DirectDispatch)
    assert parallel.fixed is not None
