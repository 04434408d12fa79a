"""What stands beside our kernels: libraries are called as their wheels declare it and do what our kernels do; one that fails is named."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcache.layout import PageLayout
from serving.bench.kernel_cases import attention, experts, products, rows
from serving.bench.kernel_cases import stage as stages
from serving.bench.kernel_cases.stage import LATENT, PLANES, ROPE, Stage, Work
from serving.bench.kernels import Row, run_case
from serving.kernels.gemm import linear_fp8_reference
from serving.kernels.norm_rope import add_rms_norm_reference, rms_norm_reference
from serving.kernels.quant import Fp8Weight, QuantisedRows, quantise_rows_fp8_reference, silu_mul_quantise_reference
from serving.kernels.rows import fp8_row_bytes
from serving.kernels.topk import gate_topk_reference

CPU = torch.device("cpu")

# As vLLM 0.24's extensions declare them.
SCHEMAS = (
    "rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()",
    "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
    "per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, "
    "float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()",
    "silu_and_mul_per_block_quant(Tensor! out, Tensor input, Tensor! scales, int group_size, Tensor? scale_ub=None, "
    "bool is_scale_transposed=False) -> ()",
    "grouped_topk(Tensor scores, int n_group, int topk_group, int topk, bool renormalize, float routed_scaling_factor, "
    "Tensor bias, int scoring_func) -> (Tensor, Tensor)",
)

GROUPS = {"num_experts": 16, "num_groups": 4, "kept": 2, "top_k": 4}
BESIDE_VLLM: dict[str, Callable[[Stage], Work]] = {
    "rms_norm": partial(rows.norm, tokens=5, width=256),
    "rms_norm/add": partial(rows.add_norm, tokens=5, width=256),
    "quantise": partial(rows.quantise, tokens=5, width=256),
    "silu_mul_quantise": partial(rows.silu_quantise, tokens=5, inner=256),
    "gate": partial(experts.gate, tokens=7, **GROUPS),
}


class Wheel:
    """vLLM's operations on a CPU. All results but picks are `factor` times what they should be."""

    def __init__(self) -> None:
        self.factor = 1.0

    def rms_norm(self, out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        out.copy_(rms_norm_reference(x, weight, eps) * self.factor)

    def fused_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        normed, summed = add_rms_norm_reference(x, residual, weight, eps)
        x.copy_(normed * self.factor)
        residual.copy_(summed)

    def per_token_group_fp8_quant(self, x: Tensor, values: Tensor, scales: Tensor, *how: Any) -> None:
        group, _, low, high, powers_of_two, _, _ = how
        assert (group, low, high, powers_of_two) == (128, -448.0, 448.0, False)
        self._store(quantise_rows_fp8_reference(x), values, scales)

    def silu_and_mul_per_block_quant(
        self, values: Tensor, x: Tensor, scales: Tensor, group: int, most: Tensor | None, transposed: bool
    ) -> None:
        assert (group, most, transposed) == (128, None, True)
        # It finds a scale by the number of rows, not by strides.
        assert scales.t().is_contiguous()
        self._store(silu_mul_quantise_reference(x), values, scales)

    def grouped_topk(
        self, scores: Tensor, n_group: int, kept: int, top_k: int, renormalise: bool, scaling: float, bias: Tensor, how: int
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert how == 1, "scores are logits"
        experts_TK, weights_TK = gate_topk_reference(
            scores, bias, num_groups=n_group, num_groups_kept=kept, top_k=top_k, renormalise=renormalise, scaling=scaling
        )  # fmt: skip
        return weights_TK.flip(1) * self.factor, experts_TK.flip(1).int()

    def _store(self, quantised: QuantisedRows, values: Tensor, scales: Tensor) -> None:
        values.copy_(quantised.values)
        scales.copy_(quantised.scales * self.factor)


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wheel]:
    made = Wheel()
    library = torch.library.Library("baton_test_vllm", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
        name = schema.partition("(")[0]
        library.impl(name, getattr(made, name), "CPU")
    for module in (rows, experts):
        monkeypatch.setattr(module, "vllm_ops", lambda namespace: torch.ops.baton_test_vllm)
    yield made
    library._destroy()


def _run(build: Callable[[Stage], Work]) -> Row:
    with torch.inference_mode():
        return run_case("beside", lambda: build(Stage(CPU, pool_bytes=4_000_000, planes=4)), CPU, {}, 1)


@pytest.mark.parametrize("name", BESIDE_VLLM)
def test_vllms_operations_take_what_we_give_them_and_their_results_are_compared(name: str, wheel: Wheel) -> None:
    row = _run(BESIDE_VLLM[name])
    assert row.error is None
    assert not row.peer_errors
    assert set(row.ratios) == {"torch", "vLLM"}
    assert row.differences == {"torch": 0.0, "vLLM": 0.0}
    wheel.factor = 1.1
    assert "outputs differ from vLLM by 0.09" in str(_run(BESIDE_VLLM[name]).error)


def test_a_peer_that_works_in_place_leaves_our_inputs(wheel: Wheel) -> None:
    work = rows.add_norm(Stage(CPU), tokens=5, width=256)
    normed = work.own(1)
    first, second = (work.peers["vLLM"](1).clone() for _ in range(2))
    assert torch.equal(first, normed)
    assert not torch.equal(second, normed)
    assert torch.equal(work.own(1), normed)


def test_picks_agree_in_any_order_and_another_expert_is_another_pick() -> None:
    work = experts.gate(Stage(CPU), tokens=7, **GROUPS)
    experts_TK, weights_TK = work.own(0)
    numbers = work.read((experts_TK, weights_TK))
    assert numbers is not None
    assert torch.equal(work.read((experts_TK.flip(1), weights_TK.flip(1))), numbers)
    assert not torch.equal(work.read((experts_TK.flip(1), weights_TK)), numbers)


def test_rows_in_fp8_are_compared_by_values_and_scales() -> None:
    x = quantise_rows_fp8_reference(torch.randn(4, 256))
    other_values = QuantisedRows(values=x.values.roll(1, 0), scales=x.scales)
    other_scales = QuantisedRows(values=x.values, scales=x.scales * 1.1)
    for peer, agrees in (x, True), (other_values, False), (other_scales, False):
        work = Work(own=lambda i: x, peers={"peer": lambda i, peer=peer: peer}, num_sets=1, amount=1.0, bound="copy")
        assert (_run(lambda stage, work=work: work).error is None) == agrees
    nan = QuantisedRows(values=torch.full((4, 256), torch.nan).to(torch.float8_e4m3fn), scales=x.scales)
    assert "not finite" in str(_run(lambda stage: Work(own=lambda i: nan, num_sets=1, amount=1.0, bound="copy")).error)


class DeepGemm:
    """Its products on a CPU. `calls`: of each masked one the rows of every expert, how many are expected, and N and K."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.calls: list[tuple[list[int], int, tuple[int, int]]] = []

    def fp8_gemm_nt(self, x: Any, w: Any, out: Tensor, *, disable_ue8m0_cast: bool) -> None:
        assert disable_ue8m0_cast
        operands = QuantisedRows(values=x[0], scales=x[1] * self.factor), Fp8Weight(quantised=w[0], scales=w[1])
        out.copy_(linear_fp8_reference(*operands))

    def m_grouped_fp8_gemm_nt_masked(
        self, x: Any, w: Any, out: Tensor, counts: Tensor, expected: int, *, disable_ue8m0_cast: bool
    ) -> None:
        assert out.shape == (*x[0].shape[:2], w[0].shape[1])
        assert counts.dtype == torch.int32
        self.calls.append((counts.tolist(), expected, (w[0].shape[1], w[0].shape[2])))
        for expert, count in enumerate(self.calls[-1][0]):
            of_expert = (x[0][expert, :count], x[1][expert, :count]), (w[0][expert], w[1][expert]), out[expert, :count]
            self.fp8_gemm_nt(*of_expert, disable_ue8m0_cast=disable_ue8m0_cast)


@pytest.fixture
def deep_gemm(monkeypatch: pytest.MonkeyPatch) -> DeepGemm:
    made = DeepGemm()
    for module in (products, experts):
        monkeypatch.setattr(module, "peer_library", {"vllm.third_party.deep_gemm": made}.get)
    return made


def test_deep_gemms_product_is_compared_where_nothing_is_done_behind_ours(deep_gemm: DeepGemm) -> None:
    dense, gate_up = (partial(build, m=3, n=512, k=256) for build in (products.linear_fp8, products.gate_up_fp8))
    assert _run(dense).differences == {"DeepGEMM": 0.0}
    row = _run(gate_up)
    assert "DeepGEMM's product" in row.ratios
    assert not row.differences
    deep_gemm.factor = 1.1
    assert "outputs differ from DeepGEMM by 0.09" in str(_run(dense).error)
    assert _run(gate_up).error is None


def test_deep_gemms_products_are_of_as_many_rows_as_the_experts_get(deep_gemm: DeepGemm) -> None:
    routed = partial(experts.experts_mlp, tokens=40, hidden=256, inner=128, num_experts=4, top_k=2, fp8=True)
    row = _run(routed)
    assert row.error is None
    assert "DeepGEMM's products" in row.ratios
    assert not row.differences
    both = [(256, 256), (256, 128)]
    assert [shape for _, _, shape in deep_gemm.calls] == both * (len(deep_gemm.calls) // 2)
    assert all(sum(counts) == 80 and expected == 20 for counts, expected, _ in deep_gemm.calls)
    assert len({tuple(counts) for counts, _, _ in deep_gemm.calls}) > 1, "each set has its own tokens"
    deep_gemm.calls.clear()
    pytest.importorskip("triton")
    experts.one_expert(Stage(CPU), tokens=40, hidden=256, inner=128).peers["DeepGEMM's products"](0)
    assert deep_gemm.calls == [([40], 40, shape) for shape in both]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Puts a module of vLLM's with this text where it is found."""
    before = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "vllm"}
    monkeypatch.syspath_prepend(tmp_path)

    def put(module: str, text: str) -> None:
        path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        importlib.invalidate_caches()

    put("vllm.__init__", "")
    yield put
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules.update(before)


def test_what_is_not_installed_is_no_peer(installed: Callable[[str, str], None]) -> None:
    row = _run(BESIDE_VLLM["rms_norm"])
    assert set(row.ratios) == {"torch"}
    assert not row.peer_errors


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "ImportError: undefined symbol: _ZN3c10"),
        ("raise RuntimeError('built for another torch')", "RuntimeError: built for another torch"),
    ],
)
def test_what_is_installed_and_does_not_load_is_that_peers_error(
    installed: Callable[[str, str], None], text: str, error: str
) -> None:
    flash_mla = "vllm.third_party.flashmla.flash_mla_interface"
    for module in ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch", flash_mla, "vllm.third_party.deep_gemm"):
        installed(module, text)
    for name, build in BESIDE_VLLM.items():
        row = _run(build)
        assert row.error is None, name
        assert row.peer_errors == {"vLLM": error}, name
        assert set(row.ratios) == {"torch"}, name
    decode = partial(attention.mla_decode, heads=4, batch=2, ctx=128, fp8=False)
    assert _run(decode).error is None
    assert _run(decode).peer_errors == {"FlashMLA": error}
    assert _run(partial(products.linear_fp8, m=3, n=160, k=256)).peer_errors["DeepGEMM"] == error


def test_an_operation_that_another_version_lacks_is_that_peers_error(installed: Callable[[str, str], None]) -> None:
    installed("vllm._C_stable_libtorch", "")
    row = _run(BESIDE_VLLM["rms_norm"])
    assert row.error is None
    assert row.peer_errors["vLLM"].startswith("AttributeError")


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("build", [attention.latent_store, attention.absorbed_query])
def test_torch_stores_the_rows_that_our_kernel_stores(build: Callable[..., Work], fp8: bool) -> None:
    ours, torchs = (Stage(CPU, pool_bytes=4_000_000, planes=4) for _ in range(2))
    with torch.inference_mode():
        of_ours, of_torch = (build(stage, tokens=5, heads=2, fp8=fp8) for stage in (ours, torchs))
        of_ours.own(1)
        assert not torch.equal(ours.pool(fp8=fp8).tensor, torchs.pool(fp8=fp8).tensor)
        of_torch.peers["torch"](1)
        assert torch.equal(ours.pool(fp8=fp8).tensor, torchs.pool(fp8=fp8).tensor)


@pytest.mark.parametrize("fp8", [False, True])
def test_torch_gathers_the_pages_that_our_kernel_gathers(monkeypatch: pytest.MonkeyPatch, fp8: bool) -> None:
    buffers: list[Tensor] = []
    zeros = torch.zeros

    def kept(*shape: int, **kind: Any) -> Tensor:
        buffers.append(zeros(*shape, **kind))
        return buffers[-1]

    stage = Stage(CPU, pool_bytes=4_000_000, planes=4)
    stage.pool(fp8=fp8)
    monkeypatch.setattr(torch, "zeros", kept)
    work = attention.gather(stage, num_pages=2, num_layers=3, fp8=fp8)
    work.own(1)
    gathered = buffers[0].clone()
    work.peers["torch"](0)
    assert not torch.equal(buffers[0], gathered)
    work.peers["torch"](1)
    assert torch.equal(buffers[0], gathered)


def test_no_page_of_a_batch_is_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[Tensor] = []
    plan = attention.mla.plan_decode

    def planned(pool: Tensor, rows: Tensor, table: Tensor, lens: Tensor) -> Any:
        tables.append(table)
        return plan(pool, rows, table, lens)

    monkeypatch.setattr(attention, "mla", SimpleNamespace(**vars(attention.mla) | {"plan_decode": planned}))
    stage = Stage(CPU, pool_bytes=4_000_000, planes=4)
    num_pages = stage.pool(fp8=False).num_pages
    decode = partial(attention.mla_decode, stage, heads=4, batch=1, fp8=False)
    decode(ctx=64 * num_pages)
    assert len(tables) == 4
    assert all(len(table.unique()) == table.numel() == num_pages for table in tables)
    with pytest.raises(AssertionError, match="pages are all different"):
        decode(ctx=64 * (num_pages + 1))


@pytest.mark.parametrize(("row_width", "element_bytes"), [(LATENT + ROPE, 2), (fp8_row_bytes(LATENT, ROPE), 1)])
def test_the_pool_has_room_for_the_longest_contexts(row_width: int, element_bytes: int) -> None:
    layout = PageLayout(num_layers=PLANES, num_mtp_layers=0, row_width=row_width, element_bytes=element_bytes)
    assert stages._POOL_BYTES // layout.page_bytes >= 32 * 16384 // 64
