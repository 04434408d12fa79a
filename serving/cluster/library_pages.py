"""The pages of shared libraries that a process has mapped, and giving back those that only its imports needed.

Importing torch, Ray and NIXL runs once through most of their libraries: relocation, registration of operators, constructors. Of the 120 MiB
that are then mapped, serving touches half. They are pages of files, in the system's cache and shared by all workers; unmapped, they are
nobody's, and the first that the system takes back when memory is short.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_MADV_DONTNEED = 4
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-[-x]p .* /.*\.so[.\d]*$")


def unmap_library_pages() -> int:
    """Bytes that were unmapped; what is touched again comes from the system's cache. Linux; elsewhere 0."""
    if sys.platform != "linux":
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return sum(
        resident for start, end, resident in _clean_mappings() if madvise(start, end - start, _MADV_DONTNEED) == 0
    )


def _clean_mappings() -> Iterator[tuple[int, int, int]]:
    """Start, end and resident bytes of what a library's file still says: nothing relocated, nothing written."""
    start = end = resident = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Rss":
            resident = int(value.split()[0]) * 1024
        elif name == "Anonymous" and end and value.split()[0] == "0":
            yield start, end, resident
        elif " " in name:
            found = _MAPPING.match(line)
            start, end = (int(found[1], 16), int(found[2], 16)) if found else (0, 0)
