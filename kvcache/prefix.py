"""Which full page holds which tokens: a hash chain over pages, and the order in which unreferenced pages are given up.

The digest of a page covers all tokens up to its end: blake2b-128(parent digest + token ids), keyed with a salt of this process, so that nobody can
construct two texts that meet. Equal digests therefore mean equal pages. If two sequences compute the same page at the same time, the first to
be published is found, and the other stays private.

Knows no states, no jobs and no tensors.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvcache.layout import PAGE_TOKENS


class PrefixIndex:
    """Digest <-> page of published pages, and the unreferenced ones among them, least recently used first."""

    def __init__(self, salt: bytes) -> None:
        self._root = hashlib.blake2b(b"baton prefix", digest_size=16, key=salt).digest()
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def find(self, token_ids: Sequence[int]) -> list[int]:
        """Pages of the longest published prefix of whole pages."""
        page_ids: list[int] = []
        for digest in self._chain(self._root, token_ids, 0, len(token_ids) // PAGE_TOKENS):
            page_id = self._page_of.get(digest)
            if page_id is None:
                break
            page_ids.append(page_id)
        return page_ids

    def add(self, token_ids: Sequence[int], page_ids: Sequence[int], num_full: int) -> None:
        """The first `num_full` pages become findable. Hashes only what is new."""
        first = num_full
        while first > 0 and page_ids[first - 1] not in self._digest_of:
            first -= 1
        parent = self._digest_of[page_ids[first - 1]] if first else self._root
        for page_id, digest in zip(
            page_ids[first:num_full], self._chain(parent, token_ids, first, num_full), strict=True
        ):
            self._digest_of[page_id] = digest
            self._page_of.setdefault(digest, page_id)

    def published(self, page_id: int) -> bool:
        """Whether a lookup can find just this page."""
        digest = self._digest_of.get(page_id)
        return digest is not None and self._page_of.get(digest) == page_id

    def idle(self, page_id: int) -> None:
        """Nobody refers to this published page any more: it is now the last to be evicted."""
        assert page_id not in self._idle, f"page {page_id} waits for eviction already"
        assert self.published(page_id), f"page {page_id} cannot be found, so it is free, not cached"
        self._idle[page_id] = None

    def wake(self, page_id: int) -> None:
        """A hit on an idle page."""
        del self._idle[page_id]

    def evict(self) -> int:
        """The least recently used idle page is forgotten. There must be one."""
        page_id, _ = self._idle.popitem(last=False)
        self.forget(page_id)
        return page_id

    def forget(self, page_id: int) -> None:
        """The page's content goes away."""
        digest = self._digest_of.pop(page_id, None)
        if digest is not None and self._page_of.get(digest) == page_id:
            del self._page_of[digest]

    def idle_page_ids(self) -> list[int]:
        """Next to be evicted first."""
        return list(self._idle)

    def check(self) -> None:
        """Lookups lead to pages whose content is known, and only findable pages wait for eviction."""
        for digest, page_id in self._page_of.items():
            assert self._digest_of.get(page_id) == digest, (
                f"a lookup leads to page {page_id}, which holds something else"
            )
        for page_id in self._idle:
            assert self.published(page_id), f"page {page_id} is cached but cannot be found"

    def known_page_ids(self) -> set[int]:
        """All pages whose content is known, findable or not."""
        return set(self._digest_of)

    def _chain(self, parent: bytes, token_ids: Sequence[int], first: int, last: int) -> Iterator[bytes]:
        """Digests of pages [first, last)."""
        for page in range(first, last):
            tokens = array("q", token_ids[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS])
            assert len(tokens) == PAGE_TOKENS, f"page {page} is not full"
            parent = hashlib.blake2b(parent + tokens.tobytes(), digest_size=16).digest()
            yield parent
