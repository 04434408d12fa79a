"""A rehearsed group on a GPU: what arrives is what arrives on a CPU, also in a captured step; weights are drawn as on a CPU's terms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from serving.kernels.quant import QuantisedRows, quantise_rows_fp8_reference
from serving.parallel.dispatch import DirectDispatch, Dispatch, FixedDispatch, HierarchicalDispatch
from serving.parallel.groups import Groups
from serving.parallel.rehearsal import Rehearsal

pytestmark = pytest.mark.gpu

GROUPS = Groups(tp=1, dp=6, ep=6, ranks_per_node=2)
SLOTS, TOKENS, TOP_K, WIDTH = 4, 300, 4, 256


def dispatch_of(form: str) -> Dispatch:
    group = Rehearsal(range(6), 3)
    if form == "direct":
        return DirectDispatch(group, SLOTS)
    if form == "fixed":
        return FixedDispatch(group, SLOTS, TOKENS)
    rail = group.subgroup(GROUPS.rail_group(3), "rail")
    return HierarchicalDispatch(rail, group.subgroup(GROUPS.node_group(3), "node"), SLOTS)


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    some = torch.Generator().manual_seed(1)
    slots = torch.rand(TOKENS, 6 * SLOTS, generator=some).argsort(1)[:, :TOP_K].contiguous()
    return torch.randn(TOKENS, WIDTH, generator=some), slots, torch.rand(TOKENS, TOP_K, generator=some)


def there_and_back(form: str, device: str, *, fp8: bool) -> tuple[Tensor, Tensor]:
    x, slots, weights = tokens()
    rows: Tensor | QuantisedRows = x.to(device)
    if fp8:
        quantised = quantise_rows_fp8_reference(x)
        scales = torch.empty_strided(quantised.scales.shape, quantised.scales.stride(), device=device)
        rows = QuantisedRows(values=quantised.values.to(device), scales=scales.copy_(quantised.scales))
    dispatch = dispatch_of(form)
    sending = dispatch.send(rows, slots.to(device), weights.to(device))
    arrived = sending.wait()
    wide = arrived.x_RD.dequantise(torch.float32) if isinstance(arrived.x_RD, QuantisedRows) else arrived.x_RD
    used = (arrived.slots_RK >= 0).any(1, keepdim=True)
    y = wide.masked_fill(~used, 0) * 2
    return wide.masked_fill(~used, 0), dispatch.give_back(sending, y).wait()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("form", ["direct", "hierarchical", "fixed"])
def test_what_arrives_is_what_arrives_on_a_cpu(form: str, fp8: bool) -> None:
    expected = there_and_back(form, "cpu", fp8=fp8)
    for _ in range(3):
        found = there_and_back(form, "cuda", fp8=fp8)
        assert torch.equal(found[0].cpu(), expected[0])
        torch.testing.assert_close(found[1].cpu(), expected[1])
    assert not torch.equal(found[0].cpu(), expected[0] * 2)


def test_a_captured_step_sees_new_rows() -> None:
    group = Rehearsal(range(4), 1)
    x = torch.randn(26, 512, device="cuda", dtype=torch.bfloat16)

    def step() -> Tensor:
        whole = x.new_empty(102, 512)
        group.all_gather(whole, x, [26, 26, 25, 25]).wait()
        out = x.new_empty(26, 512)
        group.reduce_scatter(out, whole * 2, [26, 26, 25, 25]).wait()
        return out

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    before = out.clone()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, step())
    assert not torch.equal(out, before)


def test_a_large_prefill_s_rows_move_while_others_are_computed() -> None:
    group = Rehearsal(range(8), 0)
    rows = torch.randn(80_000, 1024, device="cuda", dtype=torch.bfloat16)
    counts = [10_000] * 8
    out = torch.empty_like(rows)
    handle = group.all_to_all([out], [rows], counts, counts)
    # Memory that is let go of meanwhile must not be used anew before the copies have ended.
    kept = rows[:10_000].clone()
    del rows
    torch.zeros(80_000, 1024, device="cuda", dtype=torch.bfloat16)
    handle.wait()
    assert torch.equal(out.view(8, 10_000, 1024), kept.expand(8, -1, -1))
