"""Paged decode on the GPU in bf16, fp32 and FP8 rows: against plain softmax, in graphs, past 2^31 elements, time after time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from serving.kernels import mla
from serving.kernels.rows import pack_fp8_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LATENT, WIDTH, SCALE = 512, 576, 576**-0.5
RAGGED = [300 + 37 * i for i in range(40)]
MANY_SHORT = [1 + 23 * i % 64 for i in range(300)]


@dataclasses.dataclass
class Pool:
    tensor: Tensor
    table: Tensor
    lens: Tensor


def make_pool(lens: list[int], dtype: torch.dtype, *, first: int = 0, latent: int = LATENT, width: int = WIDTH) -> Pool:
    """Sequences on pages drawn at random from one of two layers; what nobody owns is NaN."""
    torch.manual_seed(len(lens))
    counts = [-(-n // 64) for n in lens]
    order = torch.randperm(sum(counts) + 2, device="cuda").to(torch.int32)
    rows = torch.randn(len(order) + 1, 2, 64, width, device="cuda")
    owned = torch.zeros(len(order) + 1, 64, dtype=torch.bool, device="cuda")
    table = torch.full((len(lens), max(counts) + 1), 1 << 30, dtype=torch.int32, device="cuda")
    for i, (n, pages) in enumerate(zip(lens, order[: sum(counts)].split(counts), strict=True)):
        table[i, : len(pages)] = pages
        at = torch.arange(len(pages) * 64, device="cuda")
        owned[pages.long()] = ((at >= first) & (at < n)).unflatten(0, (-1, 64))
    if dtype == torch.uint8:
        tensor = pack_fp8_rows(rows.flatten(0, 2), latent).view(*rows.shape[:3], -1)
        tensor.masked_fill_(~owned[:, None, :, None], 0xFF)
    else:
        tensor = rows.to(dtype).masked_fill_(~owned[:, None, :, None], float("nan"))
    return Pool(tensor, table, torch.tensor(lens, dtype=torch.int32, device="cuda"))


def decode(
    pool: Pool, q: Tensor, *, layer: int = 1, first: int = 0, latent: int = LATENT, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """`whole`: pages are cut for the device, not for each block of columns."""
    num_columns = q.shape[1] if q.dim() == 3 else q.shape[1] * q.shape[2]
    blocks = mla.num_column_blocks(pool.tensor, num_columns, latent=latent, rope=q.shape[-1] - latent)
    num_blocks = None if whole else blocks
    plan = mla.plan_decode(pool.tensor, pool.lens, pool.table, pool.lens, first=first, num_blocks=num_blocks)
    return mla.decode_latent(q, pool.tensor, layer, plan, latent=latent, scale=SCALE)


def queries(batch: int, tokens: int, heads: int) -> Tensor:
    shape = (batch, heads, WIDTH) if tokens == 1 else (batch, tokens, heads, WIDTH)
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def reference(pool: Pool, q: Tensor, *, layer: int = 1, first: int = 0, latent: int = LATENT) -> tuple[Tensor, Tensor]:
    return mla.decode_latent_reference(
        q.float(), pool.tensor, layer, pool.table, pool.lens, first=first, latent=latent, scale=SCALE
    )


def error(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("heads", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(
    ("lens", "first"),
    [([64], 0), ([1], 0), ([100, 7, 640, 65], 0), ([4096] * 3, 0), (RAGGED, 0), (MANY_SHORT, 0), ([2, 66, 500], 1)],
)
def test_any_mix_of_lengths(heads: int, dtype: torch.dtype, lens: list[int], first: int) -> None:
    pool = make_pool(lens, dtype, first=first)
    q = torch.randn(len(lens), heads, WIDTH, device="cuda", dtype=torch.bfloat16)
    want_out, want_lse = reference(pool, q, first=first)
    for whole in (False, True):
        out, lse = decode(pool, q, first=first, whole=whole)
        assert error(out, want_out) < 6e-3
        torch.testing.assert_close(lse, want_lse, atol=1e-2, rtol=0)
    other_layer, _ = decode(pool, q, layer=0, first=first)
    assert error(other_layer, want_out) > 0.1


@pytest.mark.parametrize(
    ("heads", "tokens"), [(16, 2), (16, 3), (16, 4), (32, 2), (32, 4), (64, 2), (64, 4), (128, 4), (20, 2)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_draft_tokens_are_causal(heads: int, tokens: int, dtype: torch.dtype) -> None:
    pool = make_pool([4, 66, 130, 700, 64, 65], dtype)
    q = torch.randn(6, tokens, heads, WIDTH, device="cuda", dtype=torch.bfloat16)
    out, lse = decode(pool, q)
    want_out, want_lse = reference(pool, q)
    assert error(out, want_out) < 6e-3
    torch.testing.assert_close(lse, want_lse, atol=1e-2, rtol=0)
    last, _ = decode(pool, q[:, -1].contiguous())
    assert error(last, want_out[:, -1]) < 6e-3
    assert error(last, want_out[:, 0]) > 0.02


@pytest.mark.parametrize(("latent", "width", "heads"), [(512, 576, 16), (128, 160, 8)])
def test_fp32_is_exact(latent: int, width: int, heads: int) -> None:
    pool = make_pool([1, 200, 65, 900], torch.float32, latent=latent, width=width)
    q = torch.randn(4, heads, width, device="cuda")
    out, lse = decode(pool, q, latent=latent)
    want_out, want_lse = reference(pool, q, latent=latent)
    assert error(out, want_out) < 1e-5
    assert error(lse, want_lse) < 1e-5
    assert error(decode(pool, q.bfloat16().float(), latent=latent)[0], want_out) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(
    ("heads", "tokens"), [(16, 1), (32, 1), (128, 1), (16, 3), (20, 3), (32, 2), (64, 2), (128, 3)]
)
def test_a_graph_holds_while_lengths_change(dtype: torch.dtype, heads: int, tokens: int) -> None:
    pool = make_pool([700, 65, tokens, 640], dtype)
    q = queries(4, tokens, heads)
    decode(pool, q)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        decode(pool, q)
        with torch.cuda.graph(graph, stream=stream):
            out, lse = decode(pool, q)
    torch.cuda.synchronize()
    for lens in ([700, 65, tokens, 640], [699, 3, tokens, 128], [64, 65, tokens, 640]):
        pool.lens.copy_(torch.tensor(lens, dtype=torch.int32))
        before = out.clone()
        graph.replay()
        eager_out, eager_lse = decode(pool, q)
        assert torch.equal(out, eager_out)
        assert torch.equal(lse, eager_lse)
        assert error(out, reference(pool, q)[0]) < 6e-3
        assert not torch.equal(out, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("heads", [16, 32, 64, 128])
def test_every_run_gives_the_same_bits(dtype: torch.dtype, heads: int) -> None:
    pool = make_pool(RAGGED, dtype)
    q = torch.randn(len(RAGGED), heads, WIDTH, device="cuda", dtype=torch.bfloat16)
    want, _ = decode(pool, q)
    assert not want.isnan().any()
    for _ in range(50):
        assert torch.equal(decode(pool, q)[0], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(
    ("heads", "tokens"), [(16, 1), (32, 1), (64, 1), (128, 1), (16, 2), (16, 4), (32, 4), (64, 2), (128, 3)]
)
def test_pages_past_2_31_elements(heads: int, tokens: int, dtype: torch.dtype) -> None:
    # Pages of 62 layers, as the published model has them.
    row = 656 if dtype == torch.uint8 else WIDTH
    num_pages = 2**31 // (62 * 64 * row) + 40
    pool = torch.zeros(num_pages, 62, 64, row, dtype=dtype, device="cuda")
    assert pool.numel() > 2**31
    rows = torch.randn(8, 64, WIDTH, device="cuda")
    far = torch.arange(num_pages - 9, num_pages - 1, device="cuda")
    pool[far, 61] = pack_fp8_rows(rows.flatten(0, 1), LATENT).view(8, 64, -1) if row == 656 else rows.to(dtype)
    lens = torch.tensor([200, 256], dtype=torch.int32, device="cuda")
    here = Pool(pool, far.to(torch.int32).view(2, 4), lens)
    q = queries(2, tokens, heads)
    want, _ = reference(here, q, layer=61)
    assert error(decode(here, q, layer=61)[0], want) < 6e-3
    near = Pool(pool, here.table - (num_pages - 9), lens)
    assert error(decode(near, q, layer=61)[0], want) > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("heads", [16, 32, 64, 128])
@pytest.mark.parametrize("empty", [[0], [1, 2, 4], [0, 1, 2, 3, 4]])
def test_a_sequence_without_rows_gives_zeros_whatever_its_table_holds(
    empty: list[int], heads: int, dtype: torch.dtype
) -> None:
    pool = make_pool([70, 300, 64, 900, 5], dtype)
    pool.lens[empty] = 0
    pool.table[empty] = (1 << 31) - 1
    q = torch.randn(5, heads, WIDTH, device="cuda", dtype=torch.bfloat16)
    out, lse = decode(pool, q)
    assert torch.equal(out[empty], torch.zeros_like(out[empty]))
    assert torch.isneginf(lse[empty]).all()
    for i in {0, 1, 2, 3, 4} - set(empty):
        alone = Pool(pool.tensor, pool.table[i : i + 1], pool.lens[i : i + 1])
        want, _ = reference(alone, q[i : i + 1])
        assert error(out[i : i + 1], want) < 6e-3
        assert error(out[i : i + 1].roll(1, dims=1), want) > 0.1


@pytest.mark.parametrize("power", [-40, 0, 14])
def test_fp8_rows_and_queries_of_any_size(power: int) -> None:
    # Scales of rows differ by 2^20 within a page, queries by 2^8 between heads.
    pool = make_pool([64, 200, 900], torch.uint8)
    scales = pool.tensor.view(torch.float32)[..., LATENT // 4 : LATENT // 4 + 4]
    sizes = torch.randint(-20, 1, scales.shape, device="cuda") + power
    scales.copy_(torch.ldexp(scales, sizes))
    q = torch.randn(3, 32, WIDTH, device="cuda") * torch.logspace(-6, 2, 32, 2.0, device="cuda")[:, None]
    q[..., :LATENT] = torch.ldexp(q[..., :LATENT], torch.tensor(-power, device="cuda"))
    q = q.bfloat16()
    out, lse = decode(pool, q)
    want_out, want_lse = reference(pool, q)
    assert error(out.double() * 2.0**-power, want_out.double() * 2.0**-power) < 6e-3
    torch.testing.assert_close(lse, want_lse, atol=1e-2, rtol=0)
    other_layer, _ = decode(pool, q, layer=0)
    assert error(other_layer.double() * 2.0**-power, want_out.double() * 2.0**-power) > 0.1
