"""The tensor that holds the latents of one worker; the only file of kvcache, beside transfer, that knows torch.

`[num_pages + 1, num_layers + num_mtp_layers, 64, row_width]`, contiguous. The last page is scratch: rows that must not be stored go there, and it is
never handed out. On a CPU the memory is anonymous and zero: a page costs nothing until it is written. Who owns a page is the manager's business.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from kvcache.layout import PAGE_TOKENS, PageLayout


class KVPool:
    """`num_pages` pages and a scratch page, zero at first; `tensor[i]` is page i."""

    def __init__(
        self, layout: PageLayout, num_pages: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        assert layout.element_bytes == dtype.itemsize, (
            f"{dtype} has {dtype.itemsize} bytes, the layout says {layout.element_bytes}"
        )
        self.layout = layout
        self.num_pages = num_pages
        shape = (num_pages + 1, layout.num_planes, PAGE_TOKENS, layout.row_width)
        self.tensor = (
            _zeros_untouched(shape, dtype)
            if torch.device(device).type == "cpu"
            else torch.zeros(shape, dtype=dtype, device=device)
        )

    @property
    def scratch_page_id(self) -> int:
        return self.num_pages

    @property
    def base_address(self) -> int:
        """Where page 0 begins; page i begins `i * layout.page_bytes` later."""
        return self.tensor.data_ptr()

    @property
    def num_bytes(self) -> int:
        """Address range of the pool, scratch page included."""
        return self.tensor.numel() * self.tensor.element_size()

    def address(self, page_id: int) -> int:
        return self.base_address + page_id * self.layout.page_bytes

    def page(self, page_id: int) -> Tensor:
        """View [planes, 64, row_width] of one page."""
        return self.tensor[page_id]

    def poison(self, page_id: int) -> None:
        """All bits of the page are set, which is NaN in every floating-point type: whoever reads what nobody wrote notices.

        For tests: `KVManager(..., on_free=pool.poison)`.
        """
        self.tensor[page_id].view(torch.uint8).fill_(0xFF)

    def poison_all(self) -> None:
        """Every page but scratch, before the first use."""
        self.tensor[: self.num_pages].view(torch.uint8).fill_(0xFF)


def _zeros_untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that the kernel provides page by page on first touch; torch.zeros would write them all."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
