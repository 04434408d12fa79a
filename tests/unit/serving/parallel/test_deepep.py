"""DeepEP is an option: who chooses it without having it learns what to do."""

from __future__ import annotations

import importlib.util

import pytest
from torch._C._distributed_c10d import HashStore

from serving.core.errors import ConfigError
from serving.parallel.deepep import deepep_dispatch


def _join(world_size: int = 2, slots_per_rank: int = 16) -> None:
    deepep_dispatch(
        HashStore(), rank=0, world_size=world_size, slots_per_rank=slots_per_rank, row_bytes=4096, deadline_s=1.0
    )


@pytest.mark.skipif(importlib.util.find_spec("deep_ep") is not None, reason="DeepEP is installed")
def test_a_missing_package_is_named_with_where_it_comes_from() -> None:
    with pytest.raises(ConfigError, match=r"needs the package deep_ep .*github.com/deepseek-ai/DeepEP"):
        _join()


@pytest.mark.parametrize(("sizes", "says"), [((16, 16), "2, 4 or 8 GPUs"), ((2, 144), "at most 128 experts a GPU")])
def test_sizes_that_its_kernels_do_not_know_are_refused(sizes: tuple[int, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _join(*sizes)
