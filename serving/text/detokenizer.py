"""Text out of a stream of tokens: whole characters only, and stop strings even where they span tokens.

    ids --Detokenizer--> text --StopMatcher--> text that may be shown

Both keep what cannot be judged yet: the detokenizer at most three bytes, the matcher the longest end of the text that
begins some stop string. What comes out, put together, does not depend on how the stream was cut.

Must not know: chat formats, requests, HTTP.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from serving.text.tokenizer import Tokenizer


class Detokenizer:
    """Incremental decoder of one sequence; O(1) amortised a token."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        """`skip_special` leaves out the tokens flagged special, as `Tokenizer.decode` does."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Text that `ids` complete. Bytes become U+FFFD as soon as nothing that follows could make them a character."""
        data = b"".join(self._tokenizer.token_bytes(i) for i in ids if i not in self._skipped)
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What was held back, an unfinished character as U+FFFD; the detokenizer is then as new."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


@dataclass
class _Progress:
    """One stop string and how much of it the text ends in; `shorter[n]` is the next best when n do not go on."""

    stop: str
    shorter: list[int]
    matched: int = 0

    def step(self, char: str) -> bool:
        """Take one more character; True when the stop string is complete."""
        while self.matched and self.stop[self.matched] != char:
            self.matched = self.shorter[self.matched]
        self.matched += self.stop[self.matched] == char
        return self.matched == len(self.stop)


def _borders(stop: str) -> list[int]:
    """For each n, the length of the longest proper prefix of `stop` that ends `stop[:n]` (Knuth-Morris-Pratt)."""
    shorter = [0] * len(stop)
    length = 0
    for n in range(1, len(stop) - 1):
        while length and stop[n] != stop[length]:
            length = shorter[length]
        length += stop[n] == stop[length]
        shorter[n + 1] = length
    return shorter


class StopMatcher:
    """Passes text on until a stop string is complete: the one that ends first, of two that end together the longer.

    `hit` is that stop string, None before. O(1) amortised a character and stop string.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`stops` must not hold an empty string. `include` passes the stop string itself on as well."""
        assert all(stops), stops
        self._stops = [_Progress(stop, _borders(stop)) for stop in stops]
        self._include = include
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """Text that can be shown now. Everything behind a hit is dropped, also in later pushes."""
        if self.hit is not None:
            return ""
        if not self._stops:
            return text
        for n, char in enumerate(text):
            complete = [progress.stop for progress in self._stops if progress.step(char)]
            if complete:
                self.hit = max(complete, key=len)
                seen = self._held + text[: n + 1]
                self._held = ""
                return seen if self._include else seen[: len(seen) - len(self.hit)]
        seen = self._held + text
        keep = len(seen) - max(progress.matched for progress in self._stops)
        self._held = seen[keep:]
        return seen[:keep]

    def flush(self) -> str:
        """The text ends here: what was held back begins no stop string after all."""
        rest, self._held = self._held, ""
        for progress in self._stops:
            progress.matched = 0
        return rest
