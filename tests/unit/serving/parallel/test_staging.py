"""Experts as rows of bytes, there and back, and checksums that see every word."""

from __future__ import annotations

import pytest
import torch

from serving.core.errors import PeerError
from serving.parallel import staging
from serving.parallel.staging import ROW_BYTES, Staging, checksums, weighted_sum
from tests.unit.serving.parallel.expert_slots import expert_weights


def test_an_expert_that_goes_piece_by_piece_arrives_whole() -> None:
    memory = Staging(expert_weights(0, 0), num_experts=2)
    assert memory.num_rows == 3
    for index, pieces in enumerate([[(0, 3)], [(0, 1), (1, 3)]]):
        for first, end in pieces:
            memory.copy_rows(expert_weights(0, index), first, memory.rows(index, first, end))
    for index in range(2):
        for staged, tensor in zip(memory.expert(index), expert_weights(0, index), strict=True):
            assert torch.equal(staged, tensor)
    assert not torch.equal(memory.expert(0)[0], memory.expert(1)[0])
    assert memory.rows(1, 1, 3).shape == (2, ROW_BYTES)


def test_an_fp8_expert_with_scales_keeps_its_bits() -> None:
    weights = [torch.randn(5, 300).to(torch.float8_e4m3fn), torch.randn(3, 2)]
    memory = Staging(weights, num_experts=1)
    memory.copy_rows(weights, 0, memory.rows(0, 0, memory.num_rows))
    found = memory.expert(0)
    assert torch.equal(found[0].view(torch.uint8), weights[0].view(torch.uint8))
    assert torch.equal(found[1], weights[1])


def test_what_is_not_shaped_as_an_expert_is_refused() -> None:
    memory = Staging(expert_weights(0, 0), num_experts=1)
    right = expert_weights(0, 1)
    assert len(memory.checked(right)) == 3
    for wrong in (right[:2], [right[0].T, *right[1:]], [right[0].double(), *right[1:]]):
        with pytest.raises(PeerError, match="instead of"):
            memory.checked(wrong)


def test_checksums_of_both_kinds_see_every_word() -> None:
    words = torch.randint(-(2**31), 2**31, (301,), dtype=torch.int64).to(torch.int32)
    for summed in (
        lambda: checksums([[words, words[:7]]])[0],
        lambda: int(weighted_sum(words.view(torch.uint8))) & ((1 << 63) - 1),
    ):
        right = summed()
        assert 0 <= right < 1 << 63
        for place in range(301):
            words[place] ^= 1 << place % 31
            assert summed() != right
            words[place] ^= 1 << place % 31
        words[[3, 4]] = words[[4, 3]]
        assert summed() != right
        words[[3, 4]] = words[[4, 3]]
        assert summed() == right
    assert checksums([]) == []


def test_a_weighted_sum_in_blocks_knows_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.arange(1, 9, dtype=torch.int32)
    monkeypatch.setattr(staging, "_BLOCK_WORDS", 4)
    monkeypatch.setattr(staging, "_weights", lambda _: torch.tensor([3, 5, 7, 9]))
    assert int(weighted_sum(words.view(torch.uint8))) == 70 + 3 * (70 + 4 * 24)
    exchanged = torch.cat([words[4:], words[:4]])
    assert weighted_sum(words.view(torch.uint8)) != weighted_sum(exchanged.view(torch.uint8))
