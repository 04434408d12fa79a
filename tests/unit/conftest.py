"""For every unit test."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from serving.kernels import packed


def pytest_collection_finish() -> None:
    """What has been imported stays: the collector's rounds over all of it, after every few tests, would be a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 50)


@pytest.fixture(scope="session", autouse=True)
def _small_matrices_are_packed() -> Iterator[None]:
    """Models of tests are small; as they come, none of their matrices would be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "WORTH_PACKING_BYTES", 0)
        yield
