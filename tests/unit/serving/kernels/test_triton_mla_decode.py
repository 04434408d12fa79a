"""Paged decode in the interpreter: cuts of a batch, parts and their merge, against plain softmax over poisoned pages."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from serving.kernels import mla
from serving.kernels.rows import fp8_row_bytes, pack_fp8_rows, unpack_fp8_rows

pytest.importorskip("triton", reason="needs triton, for its interpreter")

from serving.kernels.triton.mla_decode import cut_pages, decode_paged

LATENT, ROPE, SCALE = 16, 8, 0.3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Pool:
    """Sequences of given lengths on scattered pages of one of two layers; what nobody owns is NaN."""

    def __init__(self, lens: list[int], *, first: int = 0, latent: int = LATENT, rope: int = ROPE) -> None:
        counts = [-(-n // 64) for n in lens]
        order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(3)).to(torch.int32)
        self.tensor = torch.full((len(order) + 1, 2, 64, latent + rope), float("nan"))
        self.lens = torch.tensor(lens, dtype=torch.int32)
        self.table = torch.full((len(lens), max(counts) + 1), 1 << 30, dtype=torch.int32)
        for i, (n, pages) in enumerate(zip(lens, order[: sum(counts)].split(counts), strict=True)):
            self.table[i, : len(pages)] = pages
            rows = torch.full((len(pages) * 64, latent + rope), float("nan"))
            rows[first:n] = randn(max(n - first, 0), latent + rope, seed=10 + i)
            self.tensor[pages.long(), 1] = rows.unflatten(0, (-1, 64))


def decode(
    pool: Pool, q: Tensor, *, workers: int, groups: int | None = None, first: int = 0, latent: int = LATENT
) -> tuple[Tensor, Tensor]:
    cut = cut_pages(pool.lens, workers)
    rows = pool.tensor[:, 1]
    return decode_paged(q, rows, pool.table, pool.lens, cut, first=first, latent=latent, scale=SCALE, num_groups=groups)


def reference(pool: Pool, q: Tensor, *, first: int = 0, latent: int = LATENT) -> tuple[Tensor, Tensor]:
    return mla.decode_latent_reference(
        q, pool.tensor, 1, pool.table, pool.lens, first=first, latent=latent, scale=SCALE
    )


@pytest.mark.parametrize(
    ("lens", "workers", "first"),
    [([1], 2, 0), ([64], 2, 1), ([300], 3, 0), ([65, 64, 1], 2, 0), ([130, 70, 1, 3, 190], 3, 1)],
)
def test_parts_of_any_cut_merge_to_plain_attention(lens: list[int], workers: int, first: int) -> None:
    lens = [n + first for n in lens]
    pool, q = Pool(lens, first=first), randn(len(lens), 1, 3, LATENT + ROPE, seed=5)
    out, lse = decode(pool, q, workers=workers, first=first)
    want_out, want_lse = reference(pool, q, first=first)
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("groups", [None, 3])
def test_blocks_of_heads_attend_each_part(groups: int | None) -> None:
    pool, q = Pool([130, 70, 1, 400]), randn(4, 1, 20, LATENT + ROPE, seed=5)
    out, lse = decode(pool, q, workers=3, groups=groups)
    want_out, want_lse = reference(pool, q)
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)
    assert not torch.allclose(out[:, :, :4], want_out[:, :, 16:])


def test_draft_tokens_see_what_lies_before_them() -> None:
    pool, q = Pool([130, 66, 5]), randn(3, 4, 3, LATENT + ROPE, seed=5)
    out, lse = decode(pool, q, workers=3)
    want_out, want_lse = reference(pool, q)
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)
    pool.tensor[pool.table[1, 1], 1, 1] += 1.0
    after, _ = decode(pool, q, workers=3)
    assert torch.equal(after[1, :-1], out[1, :-1])
    assert not torch.allclose(after[1, -1], out[1, -1], atol=1e-3)


def test_more_columns_than_a_block_and_odd_widths() -> None:
    pool, q = Pool([70, 130], latent=24, rope=4), randn(2, 1, 19, 28, seed=5)
    out, lse = decode(pool, q, workers=4, latent=24)
    want_out, want_lse = reference(pool, q, latent=24)
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)


def test_a_sequence_that_sees_nothing_gives_zeros() -> None:
    pool = Pool([1, 70])
    pool.lens[0] = 0
    out, lse = decode(pool, randn(2, 1, 3, LATENT + ROPE), workers=3)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.isneginf(lse[0]).all()
    assert out[1].isfinite().all()


def test_fp8_rows_are_attended_as_what_they_stand_for() -> None:
    pool = Pool([130, 20], latent=128, rope=16)
    q = randn(2, 1, 3, 144, seed=5).to(torch.float32)
    whole = pool.tensor.flatten(0, 2)
    raw = pack_fp8_rows(torch.nan_to_num(whole), 128)
    raw[whole.isnan().any(dim=1)] = 0xFF  # NaN in e4m3, in bf16 and in fp32
    assert raw.shape[1] == fp8_row_bytes(128, 16)
    pool.tensor = raw.view(*pool.tensor.shape[:3], -1)
    out, lse = decode(pool, q, workers=2, latent=128)
    want_out, want_lse = reference(pool, q, latent=128)
    torch.testing.assert_close(out, want_out, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-4)


def test_fp8_rows_keep_their_values_to_a_sixteenth() -> None:
    rows = randn(7, 576) * torch.logspace(-3, 2, 7)[:, None]
    rows[3, :128] = 0
    back = unpack_fp8_rows(pack_fp8_rows(rows, 512), 512)
    assert pack_fp8_rows(rows, 512).shape == (7, 656)
    largest = rows[:, :512].unflatten(1, (4, 128)).abs().amax(dim=-1, keepdim=True)
    error = (back - rows)[:, :512].unflatten(1, (4, 128)).abs()
    assert (error <= rows[:, :512].unflatten(1, (4, 128)).abs() / 16 + largest / 448 / 512).all()
    assert error.max() > 0
    torch.testing.assert_close(back[:, 512:], rows[:, 512:], rtol=2**-8, atol=0)


@pytest.mark.parametrize(("num_seqs", "apart"), [(16, True), (40, False)])
def test_no_worker_has_two_sequences_where_that_costs_it_few_pages(num_seqs: int, apart: bool) -> None:
    """18 pages each: four parts of at most five for 66 workers, where even shares were 4.4; of 40 each whole sequence would be 18 for 11."""
    cut = cut_pages(torch.full((num_seqs,), 64 * 18, dtype=torch.int32), 66)
    starts = cut.page_starts.tolist()
    inside = [low < start < high for low, high in itertools.pairwise(cut.bounds.tolist()) for start in starts]
    assert any(inside) != apart


@pytest.mark.parametrize(
    ("lens", "workers"),
    [([4096] * 4, 5), ([64 * 7], 4), ([10, 4000, 3, 900, 64], 4), ([64] * 11, 4), ([1], 3), ([0, 0, 5], 4)],
)
def test_a_cut_gives_every_page_to_one_worker_and_none_much_more_than_its_share(lens: list[int], workers: int) -> None:
    cut = cut_pages(torch.tensor(lens, dtype=torch.int32), workers)
    pages = [max(-(-n // 64), 1) for n in lens]
    assert cut.page_starts.tolist() == [sum(pages[:i]) for i in range(len(pages) + 1)]
    bounds = cut.bounds.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == sum(pages)
    shares = [b - a for a, b in itertools.pairwise(bounds)]
    assert min(shares) >= 0
    assert max(shares) <= max(math.ceil(sum(pages) / workers * 1.1), math.ceil(sum(pages) / workers) + 2, 3)
    starts = cut.page_starts.tolist()
    for worker, (low, high) in enumerate(itertools.pairwise(bounds)):
        if low < high:
            seq = int(cut.first_seqs[worker])
            assert starts[seq] <= low < starts[seq + 1]
            assert int(cut.first_starts[worker]) == starts[seq]
    for seq, (first, last) in enumerate(cut.spans.tolist()):
        assert bounds[first] <= starts[seq] < bounds[first + 1]
        assert bounds[last] < starts[seq + 1] <= bounds[last + 1]
