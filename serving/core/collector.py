"""Python's garbage collector in a process that answers: it passes over what was loaded before."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def pass_over_what_is_loaded() -> None:
    """Once a process is ready, and before it answers.

    A full collection looks at every object there is, 200,000 in a worker with its libraries and its model, and who waits
    for the step in which it falls waits 0.1 s more. What is there now stays as long as the process: no later collection
    looks at it, and none frees it.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def passing_over_what_is_loaded() -> Iterator[None]:
    """The same for a while."""
    pass_over_what_is_loaded()
    try:
        yield
    finally:
        gc.unfreeze()
