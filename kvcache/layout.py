"""The bytes of a page: 64 tokens over all layers, one piece of memory.

A page is `[num_layers + num_mtp_layers][PAGE_TOKENS][row_width]` elements. A row is one token's latent of one layer (kv_lora_rank + qk_rope_head_dim
values). The MTP latent of (h_i, t_i+1) lies in the slot of token i+1, so a page is a function of the tokens up to its end. Slot 0 of a
sequence has no MTP latent: its row is never read, but travels with the others and is counted with them.

Pure arithmetic; knows neither tensors nor who owns a page.
"""

from __future__ import annotations

from dataclasses import dataclass

PAGE_TOKENS = 64


def num_pages_for(num_tokens: int) -> int:
    """Pages that hold `num_tokens` tokens; the last one may be partly used."""
    return -(-num_tokens // PAGE_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """Shape of a page. Two pools may exchange pages only if their layouts are equal."""

    num_layers: int
    num_mtp_layers: int
    row_width: int
    element_bytes: int

    @property
    def num_planes(self) -> int:
        """Layers of a page, the MTP layers last."""
        return self.num_layers + self.num_mtp_layers

    @property
    def row_bytes(self) -> int:
        return self.row_width * self.element_bytes

    @property
    def plane_bytes(self) -> int:
        """One layer of one page."""
        return PAGE_TOKENS * self.row_bytes

    @property
    def page_bytes(self) -> int:
        return self.num_planes * self.plane_bytes

    def num_pages_for(self, num_tokens: int) -> int:
        return num_pages_for(num_tokens)

    def latent_bytes(self, num_tokens: int) -> int:
        """Rows of the main layers of `num_tokens` tokens."""
        return num_tokens * self.num_layers * self.row_bytes

    def mtp_bytes(self, num_tokens: int) -> int:
        """Rows of the MTP layers of `num_tokens` tokens."""
        return num_tokens * self.num_mtp_layers * self.row_bytes

    def padding_bytes(self, num_tokens: int) -> int:
        """What whole pages holding `num_tokens` tokens carry beyond their valid rows."""
        return num_pages_for(num_tokens) * self.page_bytes - self.latent_bytes(num_tokens) - self.mtp_bytes(num_tokens)

    @property
    def identity(self) -> str:
        """The layout's part of the text that two peers hash and compare before they pair."""
        return (
            f"page_tokens={PAGE_TOKENS} layers={self.num_layers} mtp={self.num_mtp_layers} "
            f"row={self.row_width} element_bytes={self.element_bytes}"
        )
