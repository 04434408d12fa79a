"""The kernels of dynamic redundancy on the device, at the prefill unit's size."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from serving.bench.redundancy import ACTIVE, GPUS_PER_NODE, drifting_steps
from serving.kernels.redundancy import assign_replicas, assign_replicas_reference
from serving.parallel.redundancy import balance
from tests.gpu.graphs import replayed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def test_graph_and_eager_equal_the_reference_bit_by_bit() -> None:
    for step in drifting_steps(steps=60, tokens=4096, seed=2):
        if step.index % 6:
            continue
        counts, hosted = torch.from_numpy(step.counts), torch.from_numpy(step.hosted)
        want = assign_replicas_reference(counts, hosted, active=ACTIVE, gpus_per_node=GPUS_PER_NODE)
        call = partial(assign_replicas, counts.cuda(), hosted.cuda(), active=ACTIVE, gpus_per_node=GPUS_PER_NODE)
        for found in (call(), replayed(call)):
            assert torch.equal(found[0].cpu(), want[0])
            assert torch.equal(found[1].cpu(), want[1])
        assert balance(want[0].sum(dim=1).numpy()) > 0.95


def test_other_counts_are_another_answer_and_a_graph_reads_them() -> None:
    steps = list(drifting_steps(steps=2, tokens=4096, seed=3))
    hosted = torch.from_numpy(steps[0].hosted).cuda()
    first, second = (torch.from_numpy(step.counts) for step in steps)
    counts = first.cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assign_replicas(counts, hosted, active=ACTIVE, gpus_per_node=GPUS_PER_NODE)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, _ = assign_replicas(counts, hosted, active=ACTIVE, gpus_per_node=GPUS_PER_NODE)
    answers = []
    for of_step in (first, second, first):
        counts.copy_(of_step)
        graph.replay()
        answers.append(tokens.clone())
    assert torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], answers[1])


def test_every_rank_finds_the_same() -> None:
    step = next(drifting_steps(steps=1, tokens=4096, seed=4))
    counts, hosted = torch.from_numpy(step.counts).cuda(), torch.from_numpy(step.hosted).cuda()
    answers = [assign_replicas(counts, hosted, active=ACTIVE, gpus_per_node=GPUS_PER_NODE) for _ in range(20)]
    for tokens, sent in answers:
        assert torch.equal(tokens, answers[0][0])
        assert torch.equal(sent, answers[0][1])
