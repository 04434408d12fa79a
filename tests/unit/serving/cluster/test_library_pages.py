"""Library pages that a process no longer maps: fewer resident, and everything still works."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from serving.cluster.library_pages import unmap_library_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident_bytes(kind: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(kind)


def product() -> torch.Tensor:
    """Over code, tables and relocated pointers of torch's libraries."""
    x = torch.arange(6400, dtype=torch.float32).view(80, 80) / 6400
    return torch.softmax(x @ x.T, dim=-1)


def test_pages_of_libraries_go_and_come_back_as_they_were() -> None:
    before, files, private = product(), resident_bytes("RssFile"), resident_bytes("RssAnon")
    unmapped = unmap_library_pages()
    left, kept = resident_bytes("RssFile"), resident_bytes("RssAnon")
    assert unmapped > 20_000_000
    assert files - left > unmapped // 2
    assert abs(kept - private) < 2_000_000
    assert torch.equal(product(), before)
    assert unmap_library_pages() < unmapped // 2
