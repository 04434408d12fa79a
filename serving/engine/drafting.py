"""How many tokens the next step drafts: as many as pay, at this load and with drafts accepted as often as they were of late.

    tokens a row that a step of k drafts yields    1 + s_1 + s_1 s_2 + ... + s_1 ... s_k
    s_i: share of the i-th drafts that were accepted, of those whose predecessors were
    chosen: the k with the most tokens a second

Shares of drafts that are not made drift back to where they began, so that what did not pay is tried again. Pure: what a
step takes is an argument. All rows of a step have the same number of drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

StepSeconds = Callable[[int, int], float]
"""(rows, drafts of each) -> seconds of a step."""

_SHARE_AT_FIRST = 0.8
# Of one row's outcome in the running share, and of the way back in a step without drafts of that rank.
_NEW = 0.05
_BACK = 0.002


class Drafting:
    """At most `most` drafts a row."""

    def __init__(self, most: int, step_s: StepSeconds) -> None:
        assert most > 0
        self._most = most
        self._num_drafted = 0
        self._num_accepted = 0
        self._step_s = step_s
        self._shares = [_SHARE_AT_FIRST] * most

    def choose(self, num_rows: int, most: int) -> int:
        """Drafts of each of `num_rows` rows, none of which could use more than `most`."""
        best, best_rate = 0, 1.0 / self._step_s(num_rows, 0)
        num_tokens, reached = 1.0, 1.0
        for number in range(1, min(most, self._most) + 1):
            reached *= self._shares[number - 1]
            num_tokens += reached
            rate = num_tokens / self._step_s(num_rows, number)
            if rate > best_rate:
                best, best_rate = number, rate
        return best

    def settled(self, num_drafts: int, accepted: Sequence[int]) -> None:
        """A step with `num_drafts` drafts a row is over; how many were accepted in each row whose text goes on."""
        self._num_drafted += num_drafts * len(accepted)
        self._num_accepted += sum(accepted)
        for i, share in enumerate(self._shares):
            num_tried = sum(number >= i for number in accepted) if i < num_drafts else 0
            if num_tried:
                kept = (1 - _NEW) ** num_tried
                self._shares[i] = kept * share + (1 - kept) * sum(number > i for number in accepted) / num_tried
            else:
                self._shares[i] += _BACK * (_SHARE_AT_FIRST - share)

    def take_counts(self) -> tuple[int, int]:
        """Tokens drafted and accepted since the last call."""
        counts = self._num_drafted, self._num_accepted
        self._num_drafted = self._num_accepted = 0
        return counts
