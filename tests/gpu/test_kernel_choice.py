"""FlashMLA and DeepGEMM in place of our kernels: the same results, in graphs too."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.core.request import SamplingParams
from serving.engine.build import build_engine
from serving.kernels import mla
from serving.kernels.experts import grouped_mlp
from serving.kernels.gemm import linear, linear_fp8_reference
from serving.kernels.libraries import DeepGemm, FlashMla
from serving.kernels.quant import Fp8Weight, QuantisedRows, quantise_block_fp8, quantise_rows_fp8
from serving.kernels.rows import PAGE_TOKENS
from serving.model.batch import DecodeBatch
from serving.model.config import ModelConfig
from serving.model.kernels import OURS, KernelChoices
from serving.model.weights import load_weights
from tests.fp8_model import WIDE, cosine, load_wide, logits_of
from tests.gpu.graphs import replayed
from tests.gpu.test_mla_decode import LATENT, SCALE, WIDTH, Pool, error, make_pool, reference
from tests.model_factory import make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def library(make: Any, module: str) -> Any:
    return make(pytest.importorskip(module, reason="not installed"))


@pytest.fixture(scope="module")
def flash_mla() -> FlashMla:
    return library(FlashMla, "vllm.third_party.flashmla.flash_mla_interface")


@pytest.fixture(scope="module")
def deep_gemm() -> DeepGemm:
    return library(DeepGemm, "vllm.third_party.deep_gemm")


def decode(flash_mla: FlashMla | None, pool: Pool, q: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both layers of a step, on one plan."""
    num_tokens = 1 if q.dim() == 3 else q.shape[1]
    plan = mla.plan_decode(pool.tensor, pool.lens, pool.table, pool.lens, num_tokens=num_tokens, flash_mla=flash_mla)
    return [mla.decode_latent(q, pool.tensor, layer, plan, latent=LATENT, scale=SCALE) for layer in (0, 1)]


@pytest.mark.parametrize(("heads", "tokens"), [(16, 1), (64, 1), (128, 1), (16, 4), (128, 2)])
@pytest.mark.parametrize("lens", [[4, 66, 130, 700, 64, 65], [4096] * 3])
def test_flash_mla_gives_what_ours_gives(flash_mla: FlashMla, heads: int, tokens: int, lens: list[int]) -> None:
    pool = make_pool(lens, torch.bfloat16)
    shape = (len(lens), heads, WIDTH) if tokens == 1 else (len(lens), tokens, heads, WIDTH)
    q = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    parts = zip(decode(flash_mla, pool, q), decode(None, pool, q), strict=True)
    for layer, ((out, lse), (our_out, our_lse)) in enumerate(parts):
        want_out, want_lse = reference(pool, q, layer=layer)
        assert out.shape == our_out.shape
        assert error(out, want_out) < 6e-3
        assert error(out, our_out) < 6e-3
        torch.testing.assert_close(lse, want_lse, atol=1e-2, rtol=0)
        torch.testing.assert_close(lse, our_lse, atol=1e-2, rtol=0)
        assert error(out, reference(pool, q, layer=1 - layer)[0]) > 0.1


@pytest.mark.parametrize("heads", [16, 128])
def test_flash_mla_in_a_graph_follows_the_lengths(flash_mla: FlashMla, heads: int) -> None:
    pool = make_pool([700, 65, 1, 640], torch.bfloat16)
    q = torch.randn(4, heads, WIDTH, device="cuda", dtype=torch.bfloat16)
    decode(flash_mla, pool, q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode(flash_mla, pool, q)
    for lens in ([700, 65, 1, 640], [699, 3, 1, 128], [64, 65, 1, 640]):
        pool.lens.copy_(torch.tensor(lens, dtype=torch.int32))
        before = captured[1][0].clone()
        graph.replay()
        for layer, ((out, lse), (eager_out, eager_lse)) in enumerate(
            zip(captured, decode(flash_mla, pool, q), strict=True)
        ):
            assert torch.equal(out, eager_out)
            assert torch.equal(lse, eager_lse)
            assert error(out, reference(pool, q, layer=layer)[0]) < 6e-3
        assert not torch.equal(captured[1][0], before)


def test_flash_mla_finds_pages_past_2_31_elements(flash_mla: FlashMla) -> None:
    num_pages = 2**31 // (62 * 64 * WIDTH) + 40
    tensor = torch.zeros(num_pages, 62, 64, WIDTH, dtype=torch.bfloat16, device="cuda")
    far = torch.arange(num_pages - 9, num_pages - 1, device="cuda")
    tensor[far, 1] = torch.randn(8, 64, WIDTH, device="cuda", dtype=torch.bfloat16)
    pool = Pool(tensor, far.int().view(2, 4), torch.tensor([200, 256], dtype=torch.int32, device="cuda"))
    q = torch.randn(2, 128, WIDTH, device="cuda", dtype=torch.bfloat16)
    want, _ = reference(pool, q)
    assert error(decode(flash_mla, pool, q)[1][0], want) < 6e-3
    near = dataclasses.replace(pool, table=pool.table - (num_pages - 9))
    assert error(decode(flash_mla, near, q)[1][0], want) > 0.5


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_model_decodes_with_flash_mla_as_with_ours(flash_mla: FlashMla, tmp_path: Path, num_tokens: int) -> None:
    # Every expert is chosen, so that rounding sends no token elsewhere.
    make_checkpoint(tmp_path, 3, storage="bf16", **WIDE)
    config = ModelConfig.from_folder(tmp_path)
    lens = torch.tensor([5, 64, 70, 200], device="cuda")
    table = torch.arange(16, dtype=torch.int32, device="cuda").view(4, 4)
    positions = (lens[:, None] - num_tokens + torch.arange(num_tokens, device="cuda")).flatten()
    sequence = torch.arange(4, device="cuda").repeat_interleave(num_tokens)
    batch = DecodeBatch(
        token_ids_B=torch.arange(2, 2 + len(positions), device="cuda"),
        positions_B=positions,
        row_ids_B=table.long()[sequence, positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS,
        page_table_BP=table,
        context_lens_B=lens,
        num_tokens=num_tokens,
    )
    pool = torch.randn(17, config.num_kv_layers, 64, WIDTH, device="cuda").to(torch.bfloat16)

    def hidden(kernels: KernelChoices, kv_pool: Tensor) -> Tensor:
        model = load_weights(tmp_path, config, torch.bfloat16, "cuda", kernels=kernels)
        eager = model.decode(batch, kv_pool)
        assert torch.equal(replayed(lambda: model.decode(batch, kv_pool)), eager)
        return eager

    want = hidden(OURS, pool.clone())
    chosen = KernelChoices(mla_decode=flash_mla)
    assert error(hidden(chosen, pool.clone()), want) < 0.02
    assert error(hidden(chosen, pool.roll(1, dims=2)), want) > 0.05


def weight(*shape: int, library: DeepGemm | None = None) -> Fp8Weight:
    drawn = torch.randn(*shape, device="cuda") * shape[-1] ** -0.5
    pairs = [quantise_block_fp8(matrix, (128, 128)) for matrix in drawn.view(-1, *shape[-2:])]
    values, scales = (torch.stack(part).view(*shape[:-2], *part[0].shape) for part in zip(*pairs, strict=True))
    return Fp8Weight(quantised=values, scales=scales, library=library)


@pytest.mark.parametrize("rows", [3, 300])
def test_deep_gemm_gives_our_product(deep_gemm: DeepGemm, rows: int) -> None:
    x, w = quantise_rows_fp8(torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)), weight(2112, 512)
    theirs = dataclasses.replace(w, library=deep_gemm)
    got = linear(x, theirs)
    assert error(got, linear_fp8_reference(x, w)) < 3e-3
    assert error(got, linear(x, w)) < 4e-3
    assert torch.equal(replayed(lambda: linear(x, theirs)), got)
    theirs.scales[-1, -1] *= 1.5
    assert not torch.equal(linear(x, theirs), got)


def test_deep_gemm_gives_our_experts(deep_gemm: DeepGemm) -> None:
    x = torch.randn(700, 512, device="cuda", dtype=torch.bfloat16)
    experts = torch.rand(700, 7, device="cuda").topk(2, dim=-1).indices
    shares = torch.rand(700, 2, device="cuda")
    gate_up, down = weight(8, 512, 512), weight(8, 512, 256)
    theirs = [dataclasses.replace(w, library=deep_gemm) for w in (gate_up, down)]
    want = grouped_mlp(x, gate_up, down, experts, shares)
    got = grouped_mlp(x, *theirs, experts, shares)
    # A hidden value between two of e4m3 goes to either for one rounding of a sum, and theirs are rounded to bf16 between.
    assert error(got, want) < 2e-2
    assert torch.equal(replayed(lambda: grouped_mlp(x, *theirs, experts, shares)), got)
    assert error(grouped_mlp(x, *theirs, (experts + 1) % 8, shares), want) > 0.5


def test_a_model_prefills_with_deep_gemm_as_with_ours(deep_gemm: DeepGemm, tmp_path: Path) -> None:
    exact = logits_of(load_wide(tmp_path, torch.float32, "cpu"))
    config = ModelConfig.from_folder(tmp_path)

    def off(kernels: KernelChoices, factor: float = 1.0) -> float:
        model = load_weights(tmp_path, config, torch.bfloat16, "cuda", kernels=kernels)
        out = model.blocks[1].attention.out
        assert isinstance(out, Fp8Weight)
        out.scales.mul_(factor)
        return 1 - cosine(logits_of(model), exact)

    ours, theirs = off(OURS), KernelChoices(linear_fp8=deep_gemm)
    assert 0.8 * ours < off(theirs) < 1.2 * ours
    assert off(theirs, factor=1.2) > 1.3 * ours


def decode_of(num_rows: int, device: str) -> DecodeBatch:
    """A sequence a row, of 1 to 128 tokens on two pages."""
    lens = torch.arange(num_rows, device=device) * 37 % 128 + 1
    table = torch.arange(2 * num_rows, device=device).view(num_rows, 2).flip(0)
    positions = lens - 1
    pages = table.gather(1, positions[:, None] // PAGE_TOKENS)[:, 0]
    return DecodeBatch(
        token_ids_B=2 + torch.arange(num_rows, device=device) % 120,
        positions_B=positions,
        row_ids_B=pages * PAGE_TOKENS + positions % PAGE_TOKENS,
        page_table_BP=table,
        context_lens_B=lens,
    )


@pytest.mark.parametrize("num_rows", [64, 128])
def test_a_captured_decode_with_deep_gemm_is_eager_and_as_exact_as_ours(
    deep_gemm: DeepGemm, tmp_path: Path, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[int] = []
    linear = DeepGemm.linear

    def noted(self: DeepGemm, x: QuantisedRows, w: Fp8Weight) -> Tensor:
        met.append(len(x.values))
        return linear(self, x, w)

    monkeypatch.setattr(DeepGemm, "linear", noted)
    make_checkpoint(tmp_path, 3, storage="fp8", **WIDE)
    config = ModelConfig.from_folder(tmp_path)
    shape = 2 * num_rows + 1, config.num_kv_layers, PAGE_TOKENS, config.latent_width
    pool = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    plain = load_wide(tmp_path, torch.float32, "cpu")
    exact = plain.logits(plain.decode(decode_of(num_rows, "cpu"), pool.float()))

    def logits(kernels: KernelChoices, factor: float = 1.0) -> Tensor:
        model = load_weights(tmp_path, config, torch.bfloat16, "cuda", kernels=kernels)
        out = model.blocks[1].attention.out
        assert isinstance(out, Fp8Weight)
        out.scales.mul_(factor)
        batch, kv_pool = decode_of(num_rows, "cuda"), pool.cuda()
        eager = model.logits(model.decode(batch, kv_pool))
        captured = replayed(lambda: model.logits(model.decode(batch, kv_pool)))
        assert torch.equal(captured, eager)
        assert not torch.equal(captured, eager.roll(1, dims=0))
        return captured.cpu().float()

    ours = logits(OURS)
    assert not met
    theirs = logits(KernelChoices(linear_fp8=deep_gemm))
    assert set(met) == {num_rows}
    off = 1 - cosine(ours, exact)
    print(f"1 - cosine to fp32: ours {off:.6f}, theirs {1 - cosine(theirs, exact):.6f}")
    assert 0.8 * off < 1 - cosine(theirs, exact) < 1.2 * off
    # Two ways of rounding are nearly as far apart as either is from no rounding.
    assert 1 - cosine(theirs, ours) < 2.5 * off
    assert 1 - cosine(logits(KernelChoices(linear_fp8=deep_gemm), factor=1.2), exact) > 1.3 * off


def test_under_auto_no_request_waits_for_nvcc(
    deep_gemm: DeepGemm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, 3, storage="fp8", **WIDE)
    rows: set[int] = set()
    linear = DeepGemm.linear

    def noted(self: DeepGemm, x: QuantisedRows, w: Fp8Weight) -> Tensor:
        rows.add(len(x.values))
        return linear(self, x, w)

    monkeypatch.setattr(DeepGemm, "linear", noted)
    engine = build_engine(tmp_path, max_num_seqs=80, max_batched_tokens=128, num_pages=200, device="cuda")
    engine.runner.warm_up(max_batched_tokens=128, decodes=True)
    # Decode and prefill steps that were captured, and the largest; none of fewer rows.
    assert {64, 80, 128} <= rows
    assert min(rows) == 64
    rows.clear()
    # Steps behind a cached part are captured too; in pieces they have any number of rows.
    chunks = engine.runner._chunks
    chunks._graphs = {0: chunks._graphs[0]}
    loop = Aggregated(
        engine.runner,
        KVManager(engine.pool.num_pages, prefix_cache=True),
        num_slots=80,
        max_batched_tokens=128,
        max_model_len=engine.max_model_len,
        run_ahead=True,
    )
    draw = random.Random(0)
    common = [draw.randrange(2, 120) for _ in range(64)]
    for length in (100, 128, 77):
        # The common part is cached then.
        rest = [draw.randrange(2, 120) for _ in range(length)]
        loop.generate([common], SamplingParams(temperature=0.0), 1)
        loop.generate([common + rest], SamplingParams(temperature=0.0), 3)
    assert rows == {128}
