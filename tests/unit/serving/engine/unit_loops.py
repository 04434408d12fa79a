"""Units of a tiny model on virtual ranks, each DP group with the schedulers of mode `both` and requests that come when the draw says."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvcache.manager import KVManager
from serving.aggregated import Aggregated
from serving.core.config import BalanceTable, UnitTable
from serving.core.errors import BatonError
from serving.engine.balancing import Balancing
from serving.engine.build import Engine, build_engine
from serving.engine.joining import parallel_of
from serving.engine.unit import Follower, Leader, Lockstep, MicroBatches
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.units import shape_of
from serving.parallel.virtual import Fault, VirtualBell, VirtualCollectives, VirtualUnit
from tests.engine_factory import create_sequence

NUM_SLOTS = 6
NUM_PAGES = 40
ALWAYS = BalanceTable(threshold=1.0, min_gain=0.001)


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """Request `number`, not before the unit's round `round`."""

    round: int
    number: int
    prompt: list[int]
    num_new: int


@dataclass(kw_only=True)
class Outcome:
    """`texts` by request; `num_rounds` of each rank; `errors` of those that ended early; `placement_version` of some EP group."""

    texts: dict[int, list[int]] = field(default_factory=dict)
    num_rounds: list[int] = field(default_factory=list)
    errors: dict[int, BaseException] = field(default_factory=dict)
    placement_version: int = 0


@dataclass
class _Due:
    """The round of each leader's next request: with all parked, the first of them is not waited for."""

    rounds: dict[int, int] = field(default_factory=dict)

    def is_first(self, rank: int) -> bool:
        return rank in self.rounds and min((due, other) for other, due in self.rounds.items())[1] == rank


def run_unit(
    folder: Path,
    table: UnitTable,
    arrivals: Sequence[Sequence[Arrival]],
    *,
    micro_batches: MicroBatches | None = None,
    by_nodes: bool = False,
    run_ahead: bool = False,
    max_batched_tokens: int = 48,
    spoil_rank: int | None = None,
    balances: bool = False,
    faults: Sequence[Fault] = (),
) -> Outcome:
    """`arrivals` by DP group. `spoil_rank`: one expert of this rank is wrong. `balances`: experts change places every few steps."""
    config = ModelConfig.from_folder(folder)
    shape = shape_of(table, config)
    groups = shape.groups
    unit = VirtualUnit(groups, faults=faults, turn_s=30.0)
    due = _Due({dp * groups.tp: requests[0].round for dp, requests in enumerate(arrivals) if requests})
    outcome = Outcome()

    def main(world: VirtualCollectives) -> int:
        rank, at = world.rank, groups.coordinates(world.rank)

        def group_of(name: str, ranks: Sequence[int]) -> VirtualCollectives:
            return world.subgroup(ranks, name)

        lockstep = Lockstep(
            group_of("control", world.ranks),
            group_of("control-tp", groups.tp_group(rank)),
            VirtualBell(world),
            micro_batches=micro_batches,
        )
        engine = build_engine(
            folder,
            max_num_seqs=NUM_SLOTS,
            num_pages=NUM_PAGES,
            dtype="float32",
            device="cpu",
            parallel=parallel_of(shape, rank, config, group_of, by_nodes=by_nodes, queues=by_nodes),
            lockstep=lockstep,
        )
        engine.pool.poison_all()
        if rank == spoil_rank:
            _spoil(engine)
        balancing = None
        if balances:
            assert isinstance(engine.runner.model, DeepseekV3)
            ep = group_of("control-ep", groups.ep_group(rank))
            balancing = Balancing(engine.runner.model, shape, ep, ALWAYS, look_every=2)
            lockstep.attach(balancing, ep.ranks)
        if at.tp_rank:
            Follower(engine.runner, lockstep).run()
        else:
            loop = _Loop(engine, lockstep, rank, due, run_ahead=run_ahead, max_batched_tokens=max_batched_tokens)
            outcome.texts.update(loop.serve(arrivals[at.dp_rank]))
        outcome.placement_version = balancing.placement_version if balancing is not None else 0
        return lockstep.number

    try:
        outcome.num_rounds = unit.run(main)
    except BatonError:
        if not faults:
            raise
    outcome.errors = unit.errors
    return outcome


class _Loop:
    """The step loop of one DP group."""

    def __init__(
        self, engine: Engine, lockstep: Lockstep, rank: int, due: _Due, *, run_ahead: bool, max_batched_tokens: int
    ) -> None:
        self._leader = Leader(engine.runner, lockstep)
        self._lockstep = lockstep
        self._rank = rank
        self._due = due
        self._manager = KVManager(NUM_PAGES, on_free=engine.pool.poison)
        self._loop = Aggregated(
            self._leader,
            self._manager,
            num_slots=NUM_SLOTS,
            max_batched_tokens=max_batched_tokens,
            max_model_len=engine.max_model_len,
            run_ahead=run_ahead,
        )

    def serve(self, requests: Sequence[Arrival]) -> dict[int, list[int]]:
        texts: dict[int, list[int]] = {request.number: [] for request in requests}
        waiting = deque(requests)
        now_s = 0.0
        while not self._leader.turned(stopping=False, drained=not waiting and not self._loop.has_work):
            now_s += 1.0
            while waiting and self._comes(waiting[0]):
                request = waiting.popleft()
                sequence = create_sequence(str(request.number), request.prompt, max_new_tokens=request.num_new)
                self._loop.add(sequence)
            self._due.rounds.pop(self._rank, None)
            if waiting:
                self._due.rounds[self._rank] = waiting[0].round
            if self._loop.has_work:
                for event in self._loop.step(now_s).events:
                    texts[int(event.sequence.job_id)].append(event.token_id)
            elif not self._leader.awake and not self._due.is_first(self._rank):
                self._lockstep.bell.wait(self._lockstep.number, None)
        self._manager.check()
        return texts

    def _comes(self, request: Arrival) -> bool:
        if request.round <= self._lockstep.number:
            return True
        return not self._leader.awake and not self._loop.has_work and self._due.is_first(self._rank)


def _spoil(engine: Engine) -> None:
    assert isinstance(engine.runner.model, DeepseekV3)
    slots = engine.runner.model.expert_slots
    tensors = [tensor.clone() for tensor in slots.read(0, 0)]
    tensors[-1].mul_(-1)
    slots.write(0, 0, tensors)
