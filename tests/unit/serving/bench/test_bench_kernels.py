"""`baton bench kernels`: the runner on cases of the CPU, and the cases themselves at small sizes."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.bench import kernels
from serving.bench.kernel_cases import attention, exchange, experts, products, rows, steps
from serving.bench.kernel_cases.ceilings import device_copy
from serving.bench.kernel_cases.named import cases
from serving.bench.kernel_cases.stage import Call, Case, Stage, Work
from serving.bench.kernels import OWN, choose, main, run_case
from serving.bench.report import provenance
from serving.cli import main as baton
from serving.core.errors import ConfigError
from serving.kernels.norm_rope import rms_norm_reference

CPU = torch.device("cpu")


def _norms(*, peer_scale: float = 1.0, peer_pause_s: float = 0.0) -> Work:
    x = [torch.randn(64, 256) for _ in range(3)]
    weight = torch.ones(256)

    def peer(i: int) -> Tensor:
        time.sleep(peer_pause_s)
        return rms_norm_reference(x[i], weight, 1e-6) * peer_scale

    own = lambda i: rms_norm_reference(x[i], weight, 1e-6)  # noqa: E731
    return Work(own=own, peers={"peer": peer}, num_sets=3, amount=2 * 64 * 256 * 4, bound="copy")


def test_a_row_says_time_rate_share_and_ratio() -> None:
    row = run_case("norm", lambda: _norms(peer_pause_s=0.01), CPU, {"copy": 1e12, "bf16": 1.0}, 5)
    own, peer = row.timings[OWN], row.timings["peer"]
    assert row.error is None
    assert len(own.turns_us) == len(peer.turns_us) == 5
    assert own.us == sorted(own.turns_us)[2]
    assert peer.us > 10_000 > own.us > 0
    assert row.rate == pytest.approx(2 * 64 * 256 * 4 / (own.us / 1e6))
    assert row.of_ceiling == pytest.approx(row.rate / 1e12)
    assert row.ratios == {"peer": pytest.approx(own.us / peer.us)}
    assert row.differences == {"peer": 0.0}


def test_every_set_of_inputs_is_used_in_every_turn_and_systems_take_turns() -> None:
    used: list[tuple[str, int]] = []

    def call(system: str) -> Call:
        return lambda i: used.append((system, i))

    work = Work(own=call("own"), peers={"peer": call("peer")}, num_sets=3, amount=1.0, bound="copy")
    run_case("listed", lambda: work, CPU, {}, 2)
    turn = [(system, i) for system in ("own", "peer") for i in range(3)]
    assert used[-12:] == turn * 2


def test_a_peer_that_computes_something_else_fails_the_case() -> None:
    assert run_case("norm", lambda: _norms(peer_scale=1.01), CPU, {}, 1).error is None
    row = run_case("norm", lambda: _norms(peer_scale=1.1), CPU, {}, 1)
    assert row.error is not None
    assert "outputs differ from peer by 0.09" in row.error
    assert "outputs differ from peer by nan" in str(
        run_case("norm", lambda: _norms(peer_scale=torch.nan), CPU, {}, 1).error
    )


def test_an_output_that_is_not_finite_fails_the_case() -> None:
    for wrong, fails in ((1.0, False), (torch.inf, True), (torch.nan, True)):
        # Only the third set's output is wrong.
        outputs = [torch.ones(4), torch.ones(4), torch.tensor([1.0, wrong, 1.0, 1.0])]
        work = Work(own=outputs.__getitem__, num_sets=3, amount=1.0, bound="copy")
        row = run_case("third", lambda work=work: work, CPU, {}, 1)
        assert (row.error is not None) == fails
        assert not fails or "not finite" in str(row.error)


def test_a_peer_that_cannot_run_is_named_and_the_case_stands() -> None:
    def refuse(i: int) -> Tensor:
        raise NotImplementedError("not for 3 heads")

    def case() -> Work:
        return Work(own=lambda i: torch.ones(3), peers={"peer": refuse}, num_sets=2, amount=1.0, bound="copy")

    row = run_case("refused", case, CPU, {}, 1)
    assert row.error is None
    assert row.peer_errors == {"peer": "NotImplementedError: not for 3 heads"}
    assert set(row.timings) == {OWN}


def test_one_failure_stops_nothing_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Work:
        raise RuntimeError("out of shared memory")

    named: dict[str, Case] = {"norm/a": _norms, "norm/b": broken, "norm/c": _norms}
    assert _run(named, tmp_path / "out.json", monkeypatch) == 1
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in report["results"]] == ["norm/a", "norm/b", "norm/c"]
    assert report["failed"] == ["norm/b"]
    assert report["results"][1]["error"] == "RuntimeError: out of shared memory"
    assert report["results"][2]["timings"][OWN]["us"] > 0
    # A norm moves no more than a copy of as many bytes can; the copy is of this run.
    assert report["ceilings"]["copy"] > 0
    assert report["results"][0]["of_ceiling"] == pytest.approx(
        report["results"][0]["rate"] / report["ceilings"]["copy"]
    )
    table = capsys.readouterr().err
    assert "FAILED RuntimeError: out of shared memory" in table
    assert _run({"norm/a": _norms}, tmp_path / "out.json", monkeypatch) == 0


def test_a_report_has_the_versions_of_what_compiles_our_kernels_and_of_the_wheel_of_the_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def versions(**installed: str) -> dict[str, str]:
        monkeypatch.setattr("serving.bench.report.installed_version", installed.get)
        _run({"norm/a": _norms}, tmp_path / "out.json", monkeypatch)
        found: dict[str, str] = json.loads((tmp_path / "out.json").read_text())["versions"]
        return found

    with_both = versions(triton="3.6.0", vllm="0.24.0")
    assert (with_both["triton"], with_both["vllm"]) == ("3.6.0", "0.24.0")
    # Parts of a wheel on the path have no metadata; and what other commands report stays as it is.
    assert set(versions()) == set(with_both) - {"triton", "vllm"} == set(provenance(["baton"])["versions"])


def _run(named: dict[str, Case], out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The command with these cases, its ceiling a small copy."""
    limits = {"ceiling/copy": lambda: device_copy(Stage(CPU), 1 << 20)}
    monkeypatch.setattr(kernels, "_device", lambda: CPU)
    monkeypatch.setattr(kernels, "cases", lambda stage: named)
    monkeypatch.setattr(kernels, "ceilings", lambda stage: limits)
    return main(["--repeats", "1", "--out", str(out)])


def test_only_takes_the_beginnings_of_names() -> None:
    named: dict[str, Case] = dict.fromkeys(("mla_decode/bf16/h16", "mla_decode/fp8/h16", "gate/v3"), _norms)
    assert list(choose(named, [])) == list(named)
    assert list(choose(named, ["mla_decode/fp8", "gate"])) == ["mla_decode/fp8/h16", "gate/v3"]
    with pytest.raises(
        ConfigError, match="--only mla_prefill: no case is called so; cases begin with gate, mla_decode"
    ):
        choose(named, ["gate", "mla_prefill"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert baton(["bench", "kernels"]) == 2
    assert "torch finds no CUDA device here" in capsys.readouterr().err


# Of the published tables: batch and context of each column, and heads of each row, of MLA decode; M, N, K of dense products; experts,
# rows of each, N, K of products by expert.
MLA_COLUMNS = {"b32", "b64", "b128", "b128/ctx1024", "b32/ctx16384"}
MLA_HEADS = {16, 32, 64, 128}
DENSE = {"4096x7168x2048", "4096x24576x1536", "4096x4096x7168", "128x7168x16384", "64x4096x7168", "128x24576x1536"}
CONTIGUOUS = {"9x1024x4096x7168", "9x1024x7168x2048", "9x4096x4096x7168"}
MASKED = {"1x256x4096x7168", "1x256x7168x2048", "9x64x4096x7168", "9x64x7168x2048"}


def test_every_case_has_a_name_of_its_own_and_the_shapes_that_are_published() -> None:
    names = cases(Stage(CPU))
    for kind in ("bf16", "fp8"):
        assert {f"mla_decode/{kind}/h{heads}/{column}" for heads in MLA_HEADS for column in MLA_COLUMNS} < set(names)
    assert {f"linear_fp8/{shape}" for shape in DENSE} < set(names)
    assert {f"grouped_fp8/{shape}" for shape in CONTIGUOUS} < set(names)
    assert {f"grouped_fp8/masked/{shape}" for shape in MASKED} < set(names)
    assert {f"linear_silu_mul_fp8/{m}x{n}x7168" for m in (64, 4096) for n in (36864, 4096)} < set(names)
    families = {name.partition("/")[0] for name in names}
    products_of_rows = {"linear_bf16", "linear_fp8", "linear_fp32", "linear_silu_mul", "linear_by_head", "per_head"}
    between_ranks = {"route", "dispatch_rows", "sum_parts", "expert_rows"}
    assert families > products_of_rows | between_ranks | {"step_rows", "draft_rows", "sampling", "attention", "gate"}
    assert len(names) > 150


def test_a_name_of_mla_decode_says_heads_batch_and_context() -> None:
    for name, case in cases(Stage(CPU)).items():
        family, *parts = name.split("/")
        if family == "mla_decode":
            kind, heads, batch, *more = parts
            assert isinstance(case, partial)
            sizes = dict(case.keywords)
            assert sizes.pop("fp8") == (kind == "fp8")
            assert (heads, batch) == (f"h{sizes.pop('heads')}", f"b{sizes.pop('batch')}")
            ctx, num_tokens = sizes.pop("ctx"), sizes.pop("num_tokens", 1)
            assert more == ([f"ctx{ctx}"] if ctx != 4096 else [] if num_tokens == 1 else [f"drafts{num_tokens - 1}"])
            assert not sizes


SMALL: dict[str, tuple[Any, dict[str, Any]]] = {
    "mla_decode": (attention.mla_decode, {"heads": 4, "batch": 2, "ctx": 128, "fp8": False}),
    "latent_store": (attention.latent_store, {"tokens": 5, "heads": 2, "fp8": False}),
    "latent_store_fp8": (attention.latent_store, {"tokens": 5, "heads": 2, "fp8": True}),
    "absorbed_query": (attention.absorbed_query, {"tokens": 5, "heads": 2, "fp8": False}),
    "absorbed_query_fp8": (attention.absorbed_query, {"tokens": 5, "heads": 2, "fp8": True}),
    "gather": (attention.gather, {"num_pages": 2, "num_layers": 3, "fp8": False}),
    "scatter": (attention.scatter, {"num_pages": 2, "num_layers": 3, "fp8": True}),
    "attention": (attention.prefill_attention, {"batch": 2, "tokens": 9, "heads": 2}),
    "attention_quantised": (attention.prefill_attention, {"batch": 2, "tokens": 9, "heads": 2, "quantise": True}),
    "merge": (attention.merge, {"tokens": 5, "heads": 2}),
    "linear_bf16": (products.linear_bf16, {"m": 3, "n": 160, "k": 256}),
    "linear_fp32": (products.linear_bf16, {"m": 3, "n": 160, "k": 256, "fp32": True}),
    "gate_up": (products.gate_up, {"m": 3, "n": 96, "k": 64}),
    "gate_up_fp8": (products.gate_up_fp8, {"m": 3, "n": 512, "k": 256}),
    "gate_up_fp8_few": (products.gate_up_fp8, {"m": 3, "n": 512, "k": 256, "few": True}),
    "absorb": (products.absorb, {"tokens": 3, "heads": 2}),
    "values_by_head": (products.values_by_head, {"tokens": 3, "heads": 2}),
    "values_quantised": (products.values_by_head, {"tokens": 3, "heads": 2, "quantise": True}),
    "gate_product": (experts.gate_product, {"tokens": 7, "hidden": 64, "num_experts": 16, "num_groups": 4, "kept": 2, "top_k": 4}),
    "route": (exchange.route, {"tokens": 7, "num_experts": 16, "num_more": 3, "top_k": 4}),
    "copies_for": (exchange.copies_for, {"tokens": 7, "slots_a_member": 3, "num_members": 4, "top_k": 5}),
    "spread": (exchange.spread, {"tokens": 7, "hidden": 40, "slots_a_member": 3, "num_members": 4, "top_k": 5}),
    "total": (exchange.total, {"tokens": 7, "hidden": 40, "slots_a_member": 3, "num_members": 4, "top_k": 5}),
    "routing_here": (exchange.routing_here, {"tokens": 7, "slots_a_member": 3, "num_members": 4, "top_k": 5}),
    "sum_parts": (exchange.sum_parts, {"num_parts": 3, "tokens": 5, "hidden": 40}),
    "silu": (rows.silu, {"tokens": 3, "inner": 96}),
    "step_rows": (steps.step_rows, {"rows": 5, "num_pages": 9}),
    "opened": (steps.opened, {"rows": 5, "num_pages": 9, "hidden": 40}),
    "placed": (steps.placed, {"rows": 5, "num_pages": 9, "num_tokens": 4}),
    "accepted": (steps.accepted, {"rows": 5, "num_tokens": 4, "hidden": 40}),
    "top_k": (steps.drawn, {"rows": 3, "vocab": 1000, "top_k": 5}),
    "top_p": (steps.drawn, {"rows": 3, "vocab": 1000, "top_p": 0.9}),
    "linear_fp8": (products.linear_fp8, {"m": 3, "n": 160, "k": 256}),
    "linear_fp8_few": (products.linear_fp8, {"m": 3, "n": 160, "k": 256, "few": True}),
    "experts_fp8": (experts.experts_mlp, {"tokens": 4, "hidden": 128, "inner": 128, "num_experts": 4, "top_k": 2, "fp8": True}),
    "experts": (experts.experts_mlp, {"tokens": 4, "hidden": 64, "inner": 48, "num_experts": 4, "top_k": 2, "fp8": False}),
    "gate": (experts.gate, {"tokens": 7, "num_experts": 16, "num_groups": 4, "kept": 2, "top_k": 4}),
    "gate_ungrouped": (experts.gate, {"tokens": 7, "num_experts": 16, "num_groups": 1, "kept": 1, "top_k": 4}),
    "norm": (rows.norm, {"tokens": 3, "width": 96}),
    "add_norm": (rows.add_norm, {"tokens": 3, "width": 96}),
    "norm_quantise": (rows.norm_quantise, {"tokens": 3, "width": 96}),
    "quantise": (rows.quantise, {"tokens": 3, "width": 96}),
    "silu_quantise": (rows.silu_quantise, {"tokens": 3, "inner": 96}),
    "argmax": (steps.greedy, {"rows": 3, "vocab": 1000}),
    "draw": (steps.drawn, {"rows": 3, "vocab": 1000}),
}  # fmt: skip

PEERS_NEED_A_GPU = {
    "attention", "attention_quantised", "linear_fp8", "linear_fp8_few", "linear_fp32", "gate_up_fp8", "gate_up_fp8_few", "gate_product",
}  # fmt: skip
# Only libraries for a GPU do what these do.
WITHOUT_PEERS_HERE = {"mla_decode", "experts_fp8", "draw"}


@pytest.mark.parametrize("name", SMALL)
def test_cases_run_on_their_references(name: str) -> None:
    build, sizes = SMALL[name]
    stage = Stage(CPU, pool_bytes=4_000_000, planes=4)
    with torch.inference_mode():
        row = run_case(name, lambda: build(stage, **sizes), CPU, {"copy": 1e12, "bf16": 1e12, "fp8": 1e12}, 1)
    assert row.error is None
    assert row.rate > 0
    assert row.of_ceiling is not None
    assert not row.peer_errors or name in PEERS_NEED_A_GPU
    assert bool(row.ratios or row.peer_errors) == (name not in WITHOUT_PEERS_HERE)


def test_decode_attends_random_pages_of_a_pool_filled_in_every_layer_in_use() -> None:
    stage = Stage(CPU, pool_bytes=4_000_000, planes=8)
    pool = stage.pool(fp8=False)
    assert pool.num_pages * pool.layout.page_bytes >= 4_000_000
    used = {stage.layer(index) for index in range(4)}
    assert len(used) == 4
    assert all(bool(pool.tensor[:, layer].any(dim=-1).all()) for layer in used)
    assert stage.pool(fp8=False) is pool
    assert stage.pool(fp8=True).tensor.shape[3] == 656


def test_weights_of_a_stage_are_scaled_as_a_models() -> None:
    weight = Stage(CPU).weight(2, 128, 256)
    wide = weight.quantised.float() * weight.scales.repeat_interleave(128, 1).repeat_interleave(128, 2)
    assert wide.shape == (2, 128, 256)
    assert wide.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert not torch.equal(wide[0], wide[1])
