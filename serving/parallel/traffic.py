"""What the ranks of a virtual unit send each other, counted by what it is.

Columns of floating point are payload and columns of integers are routing, counts and commands. A row of an all-to-all that carries
payload and is all zeros is padding: nobody can use it.

Legend: S source rank, T target rank, L links.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from serving.parallel.collectives import row_bytes


@dataclass(kw_only=True)
class Traffic:
    """What went over one kind of link. A message is what one rank has for another in one call, payloads together.

    payload_rows: rows by the bytes of their payload. padding_bytes: of whole rows. What is left of num_bytes is routing."""

    num_messages: int = 0
    num_bytes: int = 0
    payload_rows: Counter[int] = field(default_factory=Counter)
    padding_bytes: int = 0

    @property
    def payload_bytes(self) -> int:
        return sum(width * num_rows for width, num_rows in self.payload_rows.items())

    @property
    def routing_bytes(self) -> int:
        return self.num_bytes - self.payload_bytes - self.padding_bytes


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One call. rows_ST: int64, rows from each rank for each, padding among them; padding_ST: that alone, None: there is none."""

    rows_ST: Tensor
    payload_width: int
    routing_width: int
    padding_ST: Tensor | None = None

    @classmethod
    def of(cls, rows_ST: Tensor, payloads: Sequence[Tensor], padding_ST: Tensor | None = None) -> Sent:
        """Rows of the payloads' kinds."""
        widths = [0, 0]
        for tensor in payloads:
            widths[not tensor.is_floating_point()] += tensor.shape[1:].numel() * tensor.element_size()
        return cls(rows_ST=rows_ST, payload_width=widths[0], routing_width=widths[1], padding_ST=padding_ST)

    def by_link(self, on_link_LST: Tensor) -> list[Traffic]:
        """One a link; on_link: 1 where that pair of ranks is joined by that link."""
        width = self.payload_width + self.routing_width
        rows_L = _on_links(on_link_LST, self.rows_ST)
        padding_L = [0] * len(rows_L) if self.padding_ST is None else _on_links(on_link_LST, self.padding_ST)
        messages_L = _on_links(on_link_LST, self.rows_ST > 0) if width else [0] * len(rows_L)
        return [
            Traffic(
                num_messages=messages,
                num_bytes=rows * width,
                payload_rows=Counter({self.payload_width: rows - padding} if self.payload_width else {}),
                padding_bytes=padding * width,
            )
            for messages, rows, padding in zip(messages_L, rows_L, padding_L, strict=True)
        ]


def zero_rows(payloads: Sequence[Tensor], rows_ST: Tensor) -> Tensor | None:
    """[S, T]: those of all zeros, where rows of floating point are among the payloads, rows for rank 0 of rank 0 first."""
    if not any(tensor.is_floating_point() for tensor in payloads):
        return None
    is_zero = torch.stack([_is_zero(tensor) for tensor in payloads]).all(0).cpu()
    pairs = torch.arange(rows_ST.numel()).repeat_interleave(rows_ST.flatten())
    return torch.bincount(pairs[is_zero], minlength=rows_ST.numel()).view_as(rows_ST)


def _is_zero(rows: Tensor) -> Tensor:
    whole = row_bytes(rows)
    return (whole.view(torch.int64) if whole.shape[1] % 8 == 0 else whole).any(1) == 0


def _on_links(on_link_LST: Tensor, what_ST: Tensor) -> list[int]:
    sums: list[int] = (on_link_LST * what_ST).sum((1, 2)).tolist()
    return sums
