"""The units of the report, all 352 ranks of them: texts, and what crossed which link, against what the gates chose."""

from __future__ import annotations

import resource
from collections import Counter, defaultdict

import numpy as np
import pytest

from serving.bench.units import DTYPE, Unit
from serving.bench.virtual import Run, run_units
from serving.parallel.dispatch import Dispatch
from serving.parallel.groups import Link
from serving.parallel.placement import Ints
from tests.virtual.recorded import Recorded

NUM_REQUESTS, NEW_TOKENS = 160, 16
pytestmark = pytest.mark.timeout(600)


Chosen = dict[tuple[str, int], list[Ints]]


@pytest.fixture(scope="module")
def run_and_chosen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Chosen]:
    chosen: Chosen = defaultdict(list)

    def wrap(role: str, rank: int, dispatch: Dispatch) -> Dispatch:
        return Recorded(dispatch, chosen[role, rank])  # type: ignore[return-value]

    folder = tmp_path_factory.mktemp("model")
    run = run_units("paper-32-320", folder, num_requests=NUM_REQUESTS, new_tokens=NEW_TOKENS, seed=0, wrap=wrap)
    return run, chosen


def test_texts_are_those_of_one_rank(run_and_chosen: tuple[Run, Chosen]) -> None:
    run, _ = run_and_chosen
    assert (run.prefill.sizes.groups.world_size, run.decode.sizes.groups.world_size) == (32, 320)
    assert run.prefill.sizes.split_from == run.decode.sizes.split_from > 0, "two micro-batches"
    assert len(run.texts) == NUM_REQUESTS
    assert all(len(text) == NEW_TOKENS for text in run.texts)
    assert run.texts == run.expected
    assert run.one_rank_s + run.units_s < 180
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8_000_000


def test_prefill_sends_a_token_once_to_each_node_and_there_once_to_each_gpu(run_and_chosen: tuple[Run, Chosen]) -> None:
    run, chosen = run_and_chosen
    row_bytes = run.prefill.config.hidden_size * DTYPE.itemsize
    expected: Counter[tuple[str, Link]] = Counter()
    for rank, slots in _by_rank(chosen, "prefill"):
        expected += _rows_by_nodes(rank, slots, run.prefill)
    for group in ("rail", "node"):
        for link in Link:
            # A row out, and its sum back.
            assert _payload_bytes(run.prefill, group, link) == 2 * expected[group, link] * row_bytes, (group, link)
    assert expected["rail", Link.IB] > 0
    assert expected["node", Link.NVLINK] > 0


def test_the_count_would_notice_one_row_more(run_and_chosen: tuple[Run, Chosen]) -> None:
    run, chosen = run_and_chosen
    rank, slots = _by_rank(chosen, "prefill")[0]
    groups, slots_per_node = run.prefill.sizes.groups, run.prefill.sizes.placement.slots.shape[1] // 4
    nodes = slots // slots_per_node
    row = next(row for row, of in enumerate(nodes) if len(set(of)) < groups.num_nodes)
    missing = next(node for node in range(groups.num_nodes) if node not in nodes[row])
    # One pick goes to a node where the token had none.
    moved = slots.copy()
    moved[row, 0] += (missing - nodes[row, 0]) * slots_per_node
    assert _rows_by_nodes(rank, moved, run.prefill) != _rows_by_nodes(rank, slots, run.prefill)


def test_decode_sends_a_token_once_to_each_expert(run_and_chosen: tuple[Run, Chosen]) -> None:
    run, chosen = run_and_chosen
    row_bytes = run.decode.config.hidden_size * DTYPE.itemsize
    expected: Counter[Link] = Counter()
    for rank, slots in _by_rank(chosen, "decode"):
        assert slots.shape[1] == 9
        for slot, count in zip(*np.unique(slots, return_counts=True), strict=True):
            # One expert a GPU: a slot is a rank.
            expected[run.decode.sizes.groups.link(rank, int(slot))] += int(count)
    for link in Link:
        assert _payload_bytes(run.decode, "ep", link) == 2 * expected[link] * row_bytes, link


def test_latents_cross_between_units_once(run_and_chosen: tuple[Run, Chosen]) -> None:
    run, _ = run_and_chosen
    config = run.prefill.config
    num_tokens = sum(map(len, run.prompts))
    whole = num_tokens * (config.num_layers + config.num_mtp_layers) * config.latent_width * DTYPE.itemsize
    assert run.latents.between_units == whole
    assert run.latents.inside_nodes == (run.decode.sizes.groups.tp - 1) * whole


def _by_rank(chosen: Chosen, role: str) -> list[tuple[int, Ints]]:
    return [(rank, np.concatenate(slots)) for (of, rank), slots in chosen.items() if of == role]


def _rows_by_nodes(rank: int, slots: Ints, unit: Unit) -> Counter[tuple[str, Link]]:
    """By hop and link, the rows that `rank` causes: one a node, and there one a GPU, from the one with its local index."""
    groups = unit.sizes.groups
    wanted = np.zeros((len(slots), groups.world_size), dtype=bool)
    np.put_along_axis(wanted, slots // unit.sizes.placement.slots_per_gpu, values=True, axis=1)
    rows: Counter[tuple[str, Link]] = Counter()
    for node in range(groups.num_nodes):
        first = node * groups.ranks_per_node
        on_node = wanted[:, first : first + groups.ranks_per_node]
        via = first + rank % groups.ranks_per_node
        rows["rail", groups.link(rank, via)] += int(on_node.any(axis=1).sum())
        for local in range(groups.ranks_per_node):
            rows["node", groups.link(via, first + local)] += int(on_node[:, local].sum())
    return rows


def _payload_bytes(unit: Unit, group: str, link: Link) -> int:
    seen = [traffic for (name, _, on), traffic in unit.virtual.traffic.items() if (name, on) == (group, link)]
    return sum(traffic.payload_bytes for traffic in seen)
