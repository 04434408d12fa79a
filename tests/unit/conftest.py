"""For every unit test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serving.kernels import packed


@pytest.fixture(scope="session", autouse=True)
def _small_matrices_are_packed() -> Iterator[None]:
    """Models of tests are small; as they come, none of their matrices would be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "WORTH_PACKING_BYTES", 0)
        yield
