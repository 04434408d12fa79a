"""Speculative decoding with the MTP layer: what a step does on the device when it may yield more than one token a row.

    last token, hidden state, position of each slot
      -> k drafts, the layer re-used on its own output      -> the model over the last token and the drafts
      -> a token drawn for each of these k + 1 positions    -> accepted: drafts up to the first that was not drawn
      -> last token, hidden state, position of each slot

Each token is drawn from the model, with the random number of its own position: drafts decide how many tokens a step
yields, never which. How many they are only the device knows until the step has settled, so positions live there. Rows of
drafts that were not accepted lie at and above the position that the next step begins with, which writes them anew. A
position without a page is one past the end of its text: its row goes to scratch, and its token is dropped on the host.

Legend: B rows, K drafts of each, T = K + 1 tokens of each, S slots, P pages. Must not know how tokens are sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from serving.kernels import sampling
from serving.kernels.draft_rows import accepted, opened, placed
from serving.model.batch import DecodeBatch


class DraftLayer(Protocol):
    """What is needed of `serving.model.mtp.Mtp`."""

    def store_rows(
        self, hidden_prev_TD: Tensor, token_ids_T: Tensor, positions_T: Tensor, row_ids_T: Tensor, kv_pool: Tensor
    ) -> None: ...

    def hidden(
        self,
        hidden_prev_BD: Tensor,
        token_ids_B: Tensor,
        positions_B: Tensor,
        row_ids_B: Tensor,
        page_table_BP: Tensor,
        context_lens_B: Tensor,
        kv_pool: Tensor,
    ) -> Tensor: ...


class MainModel(Protocol):
    def decode(self, batch: DecodeBatch, kv_pool: Tensor) -> Tensor: ...

    def logits(self, hidden_ND: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotState:
    """What the device keeps of every slot between steps. The last column of the page table names scratch, always."""

    last_token_S: Tensor
    hidden_SD: Tensor
    positions_S: Tensor
    page_table_SP: Tensor


class Drafted(NamedTuple):
    """A step as it was computed. `outcome_BX` [B, T + 1]: the tokens drawn and, last, how many drafts were accepted.

    `positions_B`: of the first of the T tokens; `logits_NV` [B * T, V]; `hidden_BTD` after the final norm.
    """

    outcome_BX: Tensor
    logits_NV: Tensor
    positions_B: Tensor
    drafts_BK: Tensor
    hidden_BTD: Tensor


class Speculation:
    """Steps of one model, its MTP layer and one pool over the slots of `state`. `vocab_size`: ids from there on are never drawn."""

    def __init__(
        self, model: MainModel, mtp: DraftLayer, kv_pool: Tensor, state: SlotState, *, vocab_size: int
    ) -> None:
        self._model = model
        self._mtp = mtp
        self._kv_pool = kv_pool
        self.state = state
        self._vocab_size = vocab_size

    def step(
        self, num_drafts: int, slots_B: Tensor, known_B: Tensor, page_places_B: Tensor, page_ids_B: Tensor
    ) -> Drafted:
        """Draft, compute, take the best token everywhere, accept. int64 [B] each; nothing is read back.

        `known_B`: position of the last token where the host knows it, else negative. The page table gets `page_ids_B` at
        `page_places_B` first (scratch in its last column: no new page).
        """
        state = self.state
        page_table_BP, positions_B, token_B, before_BD = opened(
            state.page_table_SP, state.positions_S, state.last_token_S, state.hidden_SD,
            slots_B, known_B, page_places_B, page_ids_B,
        )  # fmt: skip
        drafts_BK = self._draft(num_drafts, before_BD, token_B, positions_B, page_table_BP)
        hidden_BTD = self._compute(before_BD, torch.cat((token_B[:, None], drafts_BK), 1), positions_B, page_table_BP)
        logits_NV = self._model.logits(hidden_BTD.flatten(0, 1))
        tokens_BT = sampling.argmax(logits_NV[:, : self._vocab_size]).view(-1, num_drafts + 1)
        outcome_BX = self.accept(slots_B, positions_B, hidden_BTD, tokens_BT, drafts_BK)
        return Drafted(outcome_BX, logits_NV, positions_B, drafts_BK, hidden_BTD)

    def accept(
        self, slots_B: Tensor, positions_B: Tensor, hidden_BTD: Tensor, tokens_BT: Tensor, drafts_BK: Tensor
    ) -> Tensor:
        """What the slots go on with, if `tokens_BT` were drawn. Returns the outcome, int64 [B, T + 1]."""
        state = self.state
        return accepted(
            state.last_token_S, state.hidden_SD, state.positions_S,
            slots_B, positions_B, hidden_BTD, tokens_BT, drafts_BK,
        )  # fmt: skip

    def _draft(
        self, num_drafts: int, hidden_BD: Tensor, token_B: Tensor, positions_B: Tensor, page_table_BP: Tensor
    ) -> Tensor:
        """Greedy drafts, int64 [B, K], of the tokens after `token_B`, which stands at `positions_B`."""
        drafts = []
        for i in range(num_drafts):
            at = placed(page_table_BP, positions_B, first=i, num_tokens=1)
            rows = at.before_N, at.row_ids_N, page_table_BP, at.context_lens_B
            hidden_BD = self._mtp.hidden(hidden_BD, token_B, *rows, self._kv_pool)
            token_B = sampling.argmax(self._model.logits(hidden_BD)[:, : self._vocab_size])
            drafts.append(token_B)
        return torch.stack(drafts, dim=1) if drafts else token_B.new_empty(token_B.shape[0], 0)

    def _compute(self, before_BD: Tensor, tokens_BT: Tensor, positions_B: Tensor, page_table_BP: Tensor) -> Tensor:
        """Hidden states [B, T, D]; stores the rows of these tokens, the MTP layer's of true hidden states among them."""
        num_tokens = tokens_BT.shape[1]
        at = placed(page_table_BP, positions_B, first=0, num_tokens=num_tokens)
        token_ids_N = tokens_BT.flatten()
        batch = DecodeBatch(
            token_ids_B=token_ids_N,
            positions_B=at.positions_N,
            row_ids_B=at.row_ids_N,
            page_table_BP=page_table_BP,
            context_lens_B=at.context_lens_B,
            num_tokens=num_tokens,
        )
        hidden_ND = self._model.decode(batch, self._kv_pool)
        hidden_BTD = hidden_ND.view(-1, num_tokens, hidden_ND.shape[1])
        previous_ND = torch.cat((before_BD[:, None], hidden_BTD[:, :-1]), dim=1).flatten(0, 1)
        self._mtp.store_rows(previous_ND, token_ids_N, at.before_N, at.row_ids_N, self._kv_pool)
        return hidden_BTD
