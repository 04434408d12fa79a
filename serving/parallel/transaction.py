"""A change of placement as a transaction: the weights of version n + 1 arrive while version n computes, and every rank goes over
to it at the same step, or none does.

    idle -> planned -> preparing -> prepared -> committed -> reclaimed
               |           |            |
               +-----------+------------+----> aborted           version n has stayed in force, untouched

    planned      every rank has computed the same target, which is checked by its digest
    preparing    each step one exchange of at most the budget: from slots of version n into staging memory
    prepared     every byte is here and every expert has the checksum that all its copies had at start-up
    committed    all ranks, in the same step, have written their staged experts into the slots and exchanged the tables
    reclaimed    all ranks have said so, and staging memory is free for the next version

The step loop drives it. `LivePlacement.change` is a generator that every rank of the EP group resumes once a step, at the step's
boundary: each `yield` is one step of computation between issuing the collectives of a step and waiting for them. While a change is
going on, a step has one all-gather of ballots (four integers a rank) and, while preparing from peers, one all-to-all, on every rank
and whatever it has to send. There is no coordinator: each rank reads all ballots and goes by them, so all decide alike. A commit takes
place in the resumption that reads nothing but "prepared" in the ballots, which has the same number on every rank: that is the agreed step.
An abort that was asked for after the rank's own "prepared" comes too late.

**A rank that dies.** Before it has voted "prepared" nobody reads all ballots, and nobody touches a slot. When it dies, or a deadline passes, in the
midst of that last vote, some ranks may have read all ballots and others RanksMissing: no exchange of messages can rule that out (it is the two
generals' problem), and it need not. Ranks without the ballots leave the step loop with that error, on version n; the others have committed
n + 1 and begin the next step, which none of them can finish: each of its layers with experts is an exchange among all ranks of the EP group,
in which those that left take no part. So every rank comes to RanksMissing before a token is made of a step on differing versions, the unit
ends as one, and its next life loads the first placement: a version outlives no rank. A step already in flight was issued by all ranks on version n,
and what it reads is overwritten behind it.

**Memory.** A slot cannot be written while version n computes with it, so what is to come waits elsewhere. Spare slots in every layer would
cost a layer's worth of experts each: 58 x 44 MB = 2.6 GB for one slot a GPU at V3 size in FP8, and with one of them only one
slot of a layer could change at a time. Staging memory is shared by all layers instead and holds one whole layer's slots (`staged_layers`
of them): 9 x 44 MB = 396 MB on a rank of EP32, 44 MB at EP320; with it two exchange buffers of the budget's size. So a change covers
`staged_layers` layers, each of which is rearranged freely; a rebalancing of all layers is a run of such changes, each a version of its own
that is valid for good: the slots of one layer have nothing to do with those of another. The price is a copy inside the GPU at commit
(0.2 ms for 396 MB), and it leaves the weights at their addresses, as a captured CUDA graph wants them.

Steps in flight: on a GPU everything here is ordered by the stream that is current, which has to be the one that the steps run on (with
two micro-batches: after both have joined it). Ballots are read on the host, so `control` is a group over host memory; only the weights'
checksums wait for the device, once a change.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Generator
from enum import IntEnum, StrEnum
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from serving.core.errors import ConfigError, PeerError
from serving.parallel.collectives import Collectives, Done, Handle
from serving.parallel.moves import Move, Piece, find_moves, rounds
from serving.parallel.placement import Ints, Placement
from serving.parallel.staging import ROW_BYTES, Staging, checksums

Steps = Generator[None, None, bool]
"""Resumed once a step; its value says whether the change was made."""
LoadExpert = Callable[[int, int], list[Tensor]]
"""(layer, logical expert) -> its tensors as `ExpertSlots.read` gives them, in any memory."""


class Phase(StrEnum):
    IDLE = "idle"
    PLANNED = "planned"
    PREPARING = "preparing"
    PREPARED = "prepared"
    COMMITTED = "committed"
    RECLAIMED = "reclaimed"
    ABORTED = "aborted"


class Failure(IntEnum):
    """Why a rank votes against a change."""

    NONE = 0
    ASKED = 1
    CHECKSUM = 2
    SOURCE = 3
    DISAGREEMENT = 4


_MEANING = {
    Failure.ASKED: "was asked to abort",
    Failure.CHECKSUM: "received an expert whose checksum is not that of its copies",
    Failure.SOURCE: "could not load an expert from its source",
    Failure.DISAGREEMENT: "planned another change than the group's first rank",
}


class ExpertSlots(Protocol):
    """The weights of this rank's slots. All slots of all layers are alike in shapes, dtypes and device."""

    @property
    def num_layers(self) -> int:
        """Layers with experts."""

    @property
    def num_slots(self) -> int:
        """Slots of this rank in a layer."""

    def read(self, layer: int, slot: int) -> list[Tensor]:
        """What the slot holds: plain, contiguous, in a fixed order (gate_up, down and, if quantised, their scales). Views or copies."""

    def write(self, layer: int, slot: int, tensors: list[Tensor]) -> None:
        """Copies them in. Called between two steps; the next computes with them."""


class LivePlacement:
    """One rank's end of the placement in force.

    `control` and `data` are two groups of the same EP ranks in the same order (or one and the same, on a CPU): over host memory, and
    where the weights are; best groups of their own, since weights should not stand in the way of a dispatch. `placement` is what the slots hold now. `budget_bytes`: what a rank sends, and what it receives, of
    weights in one step. `load_expert`: take weights from there instead of from peers; it is called once an expert and change, within a
    step. `on_commit` gets the new placement in the step that goes over to it, to renew what routes tokens.

    Raises ConfigError for a budget of less than a row, and PeerError if copies of one expert differ.
    """

    def __init__(
        self,
        *,
        control: Collectives,
        data: Collectives,
        slots: ExpertSlots,
        placement: Placement,
        budget_bytes: int,
        ranks_per_node: int,
        staged_layers: int = 1,
        load_expert: LoadExpert | None = None,
        on_commit: Callable[[Placement], None],
    ) -> None:
        if budget_bytes < ROW_BYTES:
            raise ConfigError(
                f"a budget of {budget_bytes} bytes a step moves no expert; give at least {ROW_BYTES}, better some megabytes"
            )
        assert control.ranks == data.ranks, "ballots and weights go among the same ranks"
        assert (slots.num_layers, slots.num_slots) == (len(placement.slots), placement.slots_per_gpu)
        assert placement.num_gpus == control.world_size
        self.placement = placement
        self.version = 1
        self.phase = Phase.IDLE
        self.last_failure = Failure.NONE
        self.last_error = ""
        """Of the latest abort; empty: there was none."""
        self.num_bytes_moved = 0
        """By all ranks, in changes made and aborted."""
        self.control = control
        self._data = data
        self._slots = slots
        self._ranks_per_node = ranks_per_node
        self.staged_layers = staged_layers
        self._load_expert = load_expert
        self._on_commit = on_commit
        self._staging = Staging(slots.read(0, 0), staged_layers * slots.num_slots)
        self._budget_rows = budget_bytes // ROW_BYTES
        self._sent, self._received = (self._staging.new_rows(self._budget_rows) for _ in range(2))
        self._sources: dict[tuple[int, int], list[Tensor]] = {}
        self._failure = Failure.NONE
        self._detail = ""
        self._checksums_LE = self._known_checksums()

    def abort(self) -> None:
        """Asks for the end of the change that is going on. All ranks abort together, unless this rank has voted for the commit already."""
        self._fail(Failure.ASKED, "")

    def change(self, target: Placement) -> Steps:
        """All ranks begin it before the same step, with the same target, which differs from the placement in force in at most
        `staged_layers` layers. A target without any difference ends, unmade, once all have agreed on it.

        Raises RanksMissing, and PeerError if the ranks are not in lockstep: either ends the unit."""
        assert self.phase in (Phase.IDLE, Phase.RECLAIMED, Phase.ABORTED), f"a change begins while one is {self.phase}"
        assert (target.slots != self.placement.slots).any(axis=1).sum() <= self.staged_layers
        assert (target.slots.shape, target.num_gpus) == (self.placement.slots.shape, self.placement.num_gpus)
        self._failure, self._detail = Failure.NONE, ""
        try:
            made = yield from self._transact(target)
            self.phase = Phase.RECLAIMED
        except _Aborted as aborted:
            self.phase, made = Phase.ABORTED, False
            self.last_failure, self.last_error = aborted.failure, str(aborted)
        self._sources.clear()
        return made

    def _transact(self, target: Placement) -> Steps:
        moves = find_moves(self.placement, target, gpus_per_node=self._ranks_per_node)
        digest = self._digest(target)
        self.phase = Phase.PLANNED
        yield from self._vote(digest)
        if not moves:
            return False
        self.phase = Phase.PREPARING
        yield from self._prepare(moves, digest)
        self._verify(moves)
        self.phase = Phase.PREPARED
        yield from self._vote(digest)
        for index, move in self._own(moves).values():
            self._slots.write(move.layer, move.target % self._slots.num_slots, self._staging.expert(index))
        self.placement = target
        self.version += 1
        self._on_commit(target)
        self.phase = Phase.COMMITTED
        yield from self._vote(digest)
        return True

    def _prepare(self, moves: list[Move], digest: int) -> Generator[None, None, None]:
        links = [self._link(move) for move in moves]
        staged = {number: index for number, (index, _) in self._own(moves).items()}
        for pieces in rounds(links, num_rows=self._staging.num_rows, budget_rows=self._budget_rows):
            arriving = [piece for piece in pieces if piece.move in staged]
            exchange = self._exchange(moves, links, pieces, staged)
            yield from self._vote(digest, exchange)
            self.num_bytes_moved += ROW_BYTES * sum(piece.end - piece.first for piece in pieces)
            start = 0
            for piece in _by_rank(arriving, links, 0):
                if links[piece.move][0] != self.control.rank:
                    into = self._staging.rows(staged[piece.move], piece.first, piece.end)
                    into.copy_(self._received[start : start + len(into)])
                    start += len(into)

    def _exchange(
        self, moves: list[Move], links: list[tuple[int, int]], pieces: list[Piece], staged: dict[int, int]
    ) -> Handle:
        """Issues the step's all-to-all; what this rank has for itself is copied at once."""
        rank = self.control.rank
        send, recv = [0] * self.control.world_size, [0] * self.control.world_size
        start = 0
        for piece in _by_rank(pieces, links, 1):
            source, target = links[piece.move]
            num_rows = piece.end - piece.first
            if source == target == rank:
                self._copy(moves[piece.move], piece, self._staging.rows(staged[piece.move], piece.first, piece.end))
            elif source == rank:
                self._copy(moves[piece.move], piece, self._sent[start : start + num_rows])
                send[target] += num_rows
                start += num_rows
            elif target == rank:
                recv[source] += num_rows
        if self._load_expert:
            return Done()
        return self._data.all_to_all([self._received], [self._sent], recv, send)

    def _copy(self, move: Move, piece: Piece, into: Tensor) -> None:
        """The piece's rows from where its expert is."""
        key = (move.layer, move.expert if self._load_expert else move.source)
        try:
            if key not in self._sources:
                self._sources[key] = self._staging.checked(self._read(move))
        except Exception as error:
            # Whatever goes wrong in somebody's files costs this change, not the unit; a slot in force can be read.
            if self._load_expert is None:
                raise
            self._fail(Failure.SOURCE, f"expert {move.expert} of layer {move.layer}: {type(error).__name__}: {error}")
        else:
            self._staging.copy_rows(self._sources[key], piece.first, into)

    def _read(self, move: Move) -> list[Tensor]:
        if self._load_expert:
            return self._load_expert(move.layer, move.expert)
        return self._slots.read(move.layer, move.source % self._slots.num_slots)

    def _verify(self, moves: list[Move]) -> None:
        own = list(self._own(moves).values())
        for found, (_, move) in zip(checksums(self._staging.expert(index) for index, _ in own), own, strict=True):
            known = int(self._checksums_LE[move.layer, move.expert])
            if found != known:
                self._fail(
                    Failure.CHECKSUM, f"expert {move.expert} of layer {move.layer} has {found:x} instead of {known:x}"
                )

    def _vote(self, digest: int, exchange: Handle | None = None) -> Generator[None, None, None]:
        """One step: the ballots go out, the step computes, and the ballots of all are read. Raises _Aborted if any rank, before
        the commit, is against it."""
        phase = list(Phase).index(self.phase)
        ballot = torch.tensor([[self.version, phase, digest, self._failure]])
        ballots = ballot.new_empty(self.control.world_size, ballot.shape[1])
        handle = self.control.all_gather(ballots, ballot)
        yield
        if exchange:
            exchange.wait()
        handle.wait()
        votes = ballots.tolist()
        if any(vote[:2] != [self.version, phase] for vote in votes):
            raise PeerError(
                f"the EP ranks {self.control.ranks} are not in lockstep: (version, phase) is {[tuple(vote[:2]) for vote in votes]}; "
                "the unit has to start again"
            )
        if self.phase is not Phase.COMMITTED:
            self._count(votes)

    def _count(self, votes: list[list[int]]) -> None:
        failures = {rank: Failure(vote[3]) for rank, vote in enumerate(votes) if vote[3]}
        failures = failures or {rank: Failure.DISAGREEMENT for rank, vote in enumerate(votes) if vote[2] != votes[0][2]}
        if failures:
            # The same on all ranks, but for the detail, which is in the log of the rank that it happened to.
            rank, failure = min(failures.items())
            detail = f" ({self._detail})" if self._detail else ""
            raise _Aborted(
                failure,
                f"version {self.version + 1} was given up while {self.phase}: rank {self.control.ranks[rank]} {_MEANING[failure]}{detail}; "
                f"version {self.version} stays in force",
            )

    def _fail(self, failure: Failure, detail: str) -> None:
        """The first reason counts."""
        if not self._failure:
            self._failure, self._detail = failure, detail

    def _link(self, move: Move) -> tuple[int, int]:
        """The ranks of the EP group that send and receive it."""
        target = move.target // self._slots.num_slots
        return (target if self._load_expert else move.source // self._slots.num_slots), target

    def _own(self, moves: list[Move]) -> dict[int, tuple[int, Move]]:
        """By number, the moves to this rank, each with its place in staging memory."""
        mine = [
            number for number, move in enumerate(moves) if move.target // self._slots.num_slots == self.control.rank
        ]
        return {number: (index, moves[number]) for index, number in enumerate(mine)}

    def _digest(self, target: Placement) -> int:
        """Of all that the ranks have to have alike."""
        alike = f"{self._budget_rows} {self._staging.num_rows} {self._load_expert is None}".encode()
        return zlib.crc32(alike, zlib.crc32(target.slots.tobytes()))

    def _known_checksums(self) -> Ints:
        """[L, E], of what every slot of the group holds. Raises PeerError if copies differ."""
        places = itertools.product(range(self._slots.num_layers), range(self._slots.num_slots))
        own = torch.tensor(checksums(self._slots.read(*place) for place in places))
        own_LK = own.view(self._slots.num_layers, -1)
        all_GLK = own_LK.new_empty(self.control.world_size, *own_LK.shape)
        self.control.all_gather(all_GLK, own_LK[None]).wait()
        found_LS = all_GLK.transpose(0, 1).reshape(self._slots.num_layers, -1).numpy()
        known_LE = np.zeros(self.placement.copies.shape, dtype=np.int64)
        np.put_along_axis(known_LE, self.placement.slots, found_LS, axis=1)
        wrong = np.argwhere(np.take_along_axis(known_LE, self.placement.slots, axis=1) != found_LS).tolist()
        if wrong:
            layer, slot = wrong[0]
            raise PeerError(
                f"two copies of expert {self.placement.slots[layer, slot]} of layer {layer} differ, one of them on rank "
                f"{self.control.ranks[slot // self._slots.num_slots]}; load the weights again"
            )
        return known_LE


class _Aborted(Exception):
    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure


def _by_rank(pieces: list[Piece], links: list[tuple[int, int]], end: int) -> list[Piece]:
    """Sorted by the rank at one end of their links, 0 the sender, 1 the receiver; those of one pair of ranks keep their order."""
    return sorted(pieces, key=lambda piece: links[piece.move][end])
