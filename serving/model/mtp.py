"""The multi-token-prediction layer: drafts token i+2 from h_i and token i+1 (report section 2.2).

    x = W_eh [norm_e(Emb(t_{i+1})) ; norm_h(h_i)]   then one MoE block at rope position i, its norm, the main head

h_i is the main model's hidden state after its final norm. The latent of (h_i, t_{i+1}) lies in the slot of token i+1, in
the page layer after the main model's, so that a page is a function of the tokens up to its end. Slot 0 stays empty and is
never attended. Embedding and head are the main model's: the published files repeat them, `weights` checks and drops them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.kernels import mla
from serving.kernels.gemm import linear
from serving.kernels.norm_rope import add_rms_norm, rms_norm
from serving.kernels.packed import pack
from serving.kernels.rows import slots
from serving.model.microbatches import Pass, run
from serving.model.parallel import SINGLE, gather, local_ids, own_share, scatter_sum
from serving.parallel.collectives import Collectives

if TYPE_CHECKING:
    from serving.model.config import ModelConfig
    from serving.model.deepseek_v3 import Block, Head, Rope


class Mtp:
    """One MTP layer around its `block`; `embed` [V, D], `head` and `rope` are the main model's own."""

    def __init__(
        self, config: ModelConfig, block: Block, embed: Tensor, head: Head, rope: Rope, tp: Collectives = SINGLE.tp
    ) -> None:
        dtype, device = embed.dtype, embed.device
        self.tp = tp
        self.eps = config.rms_norm_eps
        self.embed, self.head, self.rope = embed, head, rope
        self.block = block
        self.embed_norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.hidden_norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
        self.join = torch.empty(config.hidden_size, 2 * config.hidden_size, dtype=dtype, device=device)
        self.norm = torch.empty(config.hidden_size, dtype=dtype, device=device)

    def pack(self) -> None:
        """Once loaded: into the layout that the products read fastest."""
        self.join = pack(self.join)

    @torch.inference_mode()
    def store_rows(
        self, hidden_prev_TD: Tensor, token_ids_T: Tensor, positions_T: Tensor, row_ids_T: Tensor, kv_pool: Tensor
    ) -> None:
        """Store the latent rows of T pairs (h_i, t_{i+1}), of any sequences.

        `hidden_prev_TD` holds h_i, `token_ids_T` t_{i+1}, `positions_T` i (the rope position, one less than the token's
        own), `row_ids_T` the row of token i+1. int64 where not hidden.
        """
        rope_T = self.rope.at(positions_T)
        x_TD = self._join(hidden_prev_TD, token_ids_T)
        self.block.store(x_TD, rope_T, slots(kv_pool, row_ids_T), kv_pool)

    @torch.inference_mode()
    def draft(
        self,
        hidden_prev_BD: Tensor,
        token_ids_B: Tensor,
        positions_B: Tensor,
        row_ids_B: Tensor,
        page_table_BP: Tensor,
        context_lens_B: Tensor,
        kv_pool: Tensor,
    ) -> Tensor:
        """Logits [B, vocab_size] for token i+2, as the head's; stores the row of (h_i, t_{i+1}) on the way.

        The first four as `store_rows`; `context_lens_B` counts slots up to and with token i+1's, so i + 2. Rows of slots
        1 to i must be stored. Positions of one text may be rows of one batch if all their rows were stored before.
        """
        hidden_BD = self.hidden(
            hidden_prev_BD, token_ids_B, positions_B, row_ids_B, page_table_BP, context_lens_B, kv_pool
        )
        return self.head.logits(hidden_BD)

    @torch.inference_mode()
    def hidden(
        self,
        hidden_prev_BD: Tensor,
        token_ids_B: Tensor,
        positions_B: Tensor,
        row_ids_B: Tensor,
        page_table_BP: Tensor,
        context_lens_B: Tensor,
        kv_pool: Tensor,
    ) -> Tensor:
        """As `draft`, before the head: [B, D] after the layer's norm. Taken for h_{i+1}, the layer drafts token i+3."""
        plan = mla.plan_decode(kv_pool, row_ids_B, page_table_BP, context_lens_B, first=1)

        def steps() -> Pass:
            x_BD = self._join(hidden_prev_BD, token_ids_B)
            rope_B, slots_B = self.rope.at(positions_B), slots(kv_pool, row_ids_B)
            parts = yield from self.block.decode(x_BD, None, rope_B, slots_B, plan, kv_pool)
            return gather(self.tp, add_rms_norm(*parts, self.norm, self.eps)[0], len(slots_B))

        return run([steps()])[0]

    def _join(self, hidden_prev_TD: Tensor, token_ids_T: Tensor) -> Tensor:
        """Of this rank's share of the tokens."""
        embedded = scatter_sum(self.tp, F.embedding(local_ids(self.tp, token_ids_T, self.embed), self.embed))
        embedded = rms_norm(embedded, self.embed_norm, self.eps)
        hidden_prev_TD = own_share(self.tp, hidden_prev_TD)
        return linear(torch.cat([embedded, rms_norm(hidden_prev_TD, self.hidden_norm, self.eps)], dim=-1), self.join)
