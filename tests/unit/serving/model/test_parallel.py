"""A unit of many ranks computes what one rank computes, whatever tokens each of them has."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from serving.core.errors import ConfigError
from serving.model.batch import DecodeBatch
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.experts import Moe
from serving.model.parallel import SINGLE, Hosting, Parallel, shares
from serving.model.timeline import Timeline
from serving.model.weights import load_weights
from serving.parallel.collectives import SingleRank
from serving.parallel.dispatch import DirectDispatch, Dispatch, FixedDispatch, HierarchicalDispatch
from serving.parallel.groups import Groups
from serving.parallel.placement import Placement
from serving.parallel.redundancy import hosted_placement
from serving.parallel.shared_memory import SharedMemoryCollectives
from serving.parallel.virtual import VirtualCollectives, VirtualUnit
from tests.model_factory import make_checkpoint
from tests.unit.serving.model.paged import Paged

FP64, FP32 = 1e-9, 1e-4
VOCAB = 131
NUM_EXPERTS = 8
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCAB}

# Of each DP group, what its steps are: tokens of each text that a prefill computes, or the texts that decode one more.
Step = dict[str, int] | str
SCRIPTS: tuple[tuple[Step, ...], ...] = (
    ({"a": 41, "b": 1, "c": 10}, {"a": 30, "c": 66}, "abc", "a", {}, "", "bc"),
    ({}, {"a": 3, "b": 70}, "a", "", {"c": 6}, "c", "abc"),
    ({"a": 2}, {}, "", "", {"a": 1}, "", "a"),
    ({}, {}, "", "", {}, "", ""),
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @functools.cache
    def made(**overrides: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        make_checkpoint(folder, seed=21, **{**SIZES, **overrides})
        return folder

    return made


class Texts:
    """The tokens of a DP group's texts, as many as are asked for."""

    def __init__(self, group: int) -> None:
        generator = torch.Generator().manual_seed(group)
        self._ids = {name: torch.randint(0, VOCAB, (200,), generator=generator).tolist() for name in "abc"}
        self._used = dict.fromkeys("abc", 0)

    def take(self, name: str, count: int) -> list[int]:
        start = self._used[name]
        self._used[name] += count
        return self._ids[name][start : start + count]


def play(model: DeepseekV3, group: int, num_micro_batches: int = 1, timeline: Timeline | None = None) -> list[Tensor]:
    """Logits of each step of the group's script, then of drafts behind each of its texts."""
    run, texts, out = Paged(model, num_pages=10), Texts(group), []
    for step in SCRIPTS[group]:
        if isinstance(step, str):
            one_more = {name: texts.take(name, 1)[0] for name in step}
            logits = run.decode_each(halves(one_more) if num_micro_batches == 2 else [one_more], timeline)
        else:
            chunks = {name: texts.take(name, count) for name, count in step.items()}
            logits = run.prefill_each(cut(chunks) if num_micro_batches == 2 else [chunks], timeline)
        out += [logits[name] for name in sorted(logits)]
    return [*out, again(run), drafts(run)]


def halves(tokens: dict[str, int]) -> list[dict[str, int]]:
    names = sorted(tokens)
    return [{name: tokens[name] for name in part} for part in (names[::2], names[1::2])]


def cut(chunks: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """The first text goes on in the second micro-batch."""
    if not chunks:
        return [{}, {}]
    name = min(chunks)
    first, rest = chunks[name][:2], chunks[name][2:]
    return [{name: first}, {**({name: rest} if rest else {}), **{k: v for k, v in chunks.items() if k != name}}]


def again(run: Paged) -> Tensor:
    """Logits of the last two tokens of every text that has them, in one decode step of two tokens a text."""
    names = [name for name in sorted(run.tokens) if len(run.tokens[name]) > 1]
    none = torch.empty(0, dtype=torch.int64)
    lens = [len(run.tokens[name]) for name in names]
    batch = DecodeBatch(
        token_ids_B=torch.tensor([token for name in names for token in run.tokens[name][-2:]], dtype=torch.int64),
        positions_B=torch.tensor([p for length in lens for p in (length - 2, length - 1)], dtype=torch.int64),
        row_ids_B=torch.cat([none, *(run.rows(name, n - 2, n) for name, n in zip(names, lens, strict=True))]),
        page_table_BP=page_table(run, names),
        context_lens_B=torch.tensor(lens, dtype=torch.int64),
        num_tokens=2,
    )
    return run.model.logits(run.model.decode(batch, run.pool))


def page_table(run: Paged, names: list[str]) -> Tensor:
    rows = [[*run.page_ids[name], *[0] * (3 - len(run.page_ids[name]))] for name in names]
    return torch.tensor(rows, dtype=torch.int64).view(len(names), 3)


def drafts(run: Paged) -> Tensor:
    """Behind every text of two tokens or more, all its MTP rows stored."""
    assert run.model.mtp is not None
    names = [name for name in sorted(run.tokens) if len(run.tokens[name]) > 1]
    none = torch.empty(0, dtype=torch.int64)
    hidden = {name: torch.cat(run.hidden[name])[:-1] for name in names}
    ids = {name: torch.tensor(run.tokens[name])[1:] for name in names}
    rows = {name: run.rows(name, 1, len(run.tokens[name])) for name in names}
    positions = {name: torch.arange(len(ids[name])) for name in names}
    width = run.model.config.hidden_size
    run.model.mtp.store_rows(
        torch.cat([run.pool.new_empty(0, width), *hidden.values()]),
        *(torch.cat([none, *parts.values()]) for parts in (ids, positions, rows)),
        run.pool,
    )
    return run.model.mtp.draft(
        torch.cat([run.pool.new_empty(0, width), *(parts[-1:] for parts in hidden.values())]),
        *(torch.cat([none, *(each[-1:] for each in parts.values())]) for parts in (ids, positions, rows)),
        page_table(run, names),
        torch.tensor([len(run.tokens[name]) for name in names], dtype=torch.int64),
        run.pool,
    )


class Counted:
    """A rank's end of a group that notes what is called."""

    def __init__(self, group: VirtualCollectives, name: str, calls: list[str]) -> None:
        self._group, self._name, self._calls = group, name, calls

    def __getattr__(self, name: str) -> Any:
        if name in ("all_gather", "reduce_scatter", "all_to_all", "broadcast", "barrier"):
            self._calls.append(f"{self._name}.{name}")
        return getattr(self._group, name)


def placement(ep: int, slots_per_gpu: int, *, shared_is_routed: bool = False) -> Placement:
    """Of the MoE layers and the MTP layer, in no order, the slots that are left for copies of any expert."""
    num_experts, num_slots = NUM_EXPERTS + shared_is_routed, ep * slots_per_gpu
    random = np.random.default_rng(5)
    slots = [
        random.permutation(np.r_[np.arange(num_experts), random.integers(num_experts, size=num_slots - num_experts)])
        for _ in range(3)
    ]
    return Placement(slots=np.array(slots), num_experts=num_experts, num_gpus=ep)


def parallel_of(
    world: VirtualCollectives,
    groups: Groups,
    placed: Placement | None,
    shared_is_routed: bool,
    capacity: int,
    calls: list[str],
    active: int | None,
) -> Parallel:
    """A rank's place; across nodes the dispatch goes by rails, with a capacity it is fixed; with `active` slots replicas are chosen."""

    def group(name: str, ranks: Sequence[int]) -> Any:
        return Counted(world.subgroup(ranks, name), name, calls)

    rank = world.rank
    tp = group("tp", groups.tp_group(rank))
    if placed is None:
        return Parallel(tp=tp)
    dispatch: Dispatch
    if capacity:
        dispatch = FixedDispatch(group("ep", groups.ep_group(rank)), placed.slots_per_gpu, capacity)
    elif groups.num_nodes > 1:
        rail, node = group("rail", groups.rail_group(rank)), group("node", groups.node_group(rank))
        dispatch = HierarchicalDispatch(rail, node, placed.slots_per_gpu)
    else:
        dispatch = DirectDispatch(group("ep", groups.ep_group(rank)), placed.slots_per_gpu)
    ep_rank = groups.coordinates(rank).ep_rank
    hosting = None
    if active is not None:
        counts = group("counts", groups.ep_group(rank))
        hosting = Hosting(counts=counts, active=active, ranks_per_node=min(groups.ranks_per_node, groups.ep))
    return Parallel(
        tp=tp,
        experts=dispatch,
        placement=placed,
        ep_rank=ep_rank,
        shared_is_routed=shared_is_routed,
        hosting=hosting,
    )


def _serve(pipe: Connection, folder: Path, name: str, rank: int) -> None:
    """One of two ranks that are processes, both one TP group and one EP group."""
    torch.set_num_threads(1)
    world = SharedMemoryCollectives(name=name, ranks=(0, 1), rank=rank, deadline_s=60.0)
    placed = placement(2, 5)
    experts = DirectDispatch(world.subgroup((0, 1), "ep"), placed.slots_per_gpu)
    parallel = Parallel(tp=world.subgroup((0, 1), "tp"), experts=experts, placement=placed, ep_rank=rank)
    with torch.inference_mode():
        model = load_weights(folder, ModelConfig.from_folder(folder), torch.float64, parallel=parallel)
        taken = Timeline(rank=rank)
        results = play(model, 0, 2, taken)
    pipe.send(([result.numpy() for result in results], taken.chrome_trace()))


def play_unit(
    folder: Path,
    groups: Groups,
    dtype: torch.dtype,
    *,
    placed: Placement | None = None,
    shared_is_routed: bool = False,
    num_micro_batches: int = 1,
    capacity: int = 0,
    active: int | None = None,
    spoil: Callable[[int, DeepseekV3], None] = lambda rank, model: None,
    meanwhile: Callable[[int, DeepseekV3, VirtualCollectives], None] = lambda rank, model, world: None,
    calls: dict[int, list[str]] | None = None,
) -> list[list[Tensor]]:
    """`play` on every rank, each with its DP group's script."""
    config = ModelConfig.from_folder(folder)

    def main(world: VirtualCollectives) -> list[Tensor]:
        rank = world.rank
        noted = [] if calls is None else calls.setdefault(rank, [])
        parallel = parallel_of(world, groups, placed, shared_is_routed, capacity, noted, active)
        with torch.inference_mode():
            model = load_weights(folder, config, dtype, parallel=parallel)
            spoil(rank, model)
            meanwhile(rank, model, world)
            return play(model, groups.coordinates(rank).dp_rank, num_micro_batches)

    return VirtualUnit(groups).run(main)


@functools.cache
def wanted(folder: Path, dtype: torch.dtype, group: int) -> list[Tensor]:
    """What a single rank computes."""
    with torch.inference_mode():
        return play(load_weights(folder, ModelConfig.from_folder(folder), dtype), group)


def gap(
    folder: Path, groups: Groups, dtype: torch.dtype, got: Sequence[Sequence[Tensor]], *, drafts: bool = True
) -> float:
    """The largest difference of any rank's logits from the single rank's, of drafts too."""
    worst = 0.0
    for rank, ours in enumerate(got):
        singles = wanted(folder, dtype, groups.coordinates(rank).dp_rank)
        for mine, single in zip(ours, singles if drafts else singles[:-1], strict=True):
            assert mine.shape == single.shape
            worst = max(worst, *(mine - single).abs().flatten().tolist(), 0.0)
            assert bool(torch.isfinite(mine).all())
    return worst


@pytest.mark.parametrize(("tp", "q_lora_rank"), [(2, 48), (4, None), (8, 48)])
def test_tensor_parallel_ranks_equal_one(folders: Callable[..., Path], tp: int, q_lora_rank: int | None) -> None:
    folder, groups = folders(q_lora_rank=q_lora_rank), Groups(tp=tp, dp=1, ep=1, ranks_per_node=tp)
    calls: dict[int, list[str]] = {}
    assert gap(folder, groups, torch.float64, play_unit(folder, groups, torch.float64, calls=calls)) < FP64
    assert len(calls[0]) >= 45
    assert all(ours == calls[0] for ours in calls.values())


def test_two_tensor_parallel_ranks_equal_one_in_fp32(folders: Callable[..., Path]) -> None:
    folder, groups = folders(q_lora_rank=48), Groups(tp=2, dp=1, ep=1, ranks_per_node=2)
    assert gap(folder, groups, torch.float32, play_unit(folder, groups, torch.float32)) < FP32


EXPERT_PARALLEL = {
    "TP2 x DP2, EP4": (Groups(tp=2, dp=2, ep=4, ranks_per_node=4), 2, False, 48),
    "TP2 x DP2, EP4 on 2 nodes, redundant experts": (Groups(tp=2, dp=2, ep=4, ranks_per_node=2), 3, False, None),
    "TP1 x DP4, EP4, routed shared expert": (Groups(tp=1, dp=4, ep=4, ranks_per_node=4), 4, True, 48),
    "TP4 x DP1, EP2, redundant experts": (Groups(tp=4, dp=1, ep=2, ranks_per_node=4), 6, False, 48),
}


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("name", EXPERT_PARALLEL)
def test_expert_parallel_ranks_equal_one(folders: Callable[..., Path], name: str, num_micro_batches: int) -> None:
    groups, slots_per_gpu, shared_is_routed, q_lora_rank = EXPERT_PARALLEL[name]
    folder, calls = folders(q_lora_rank=q_lora_rank), dict[int, list[str]]()
    got = play_unit(
        folder,
        groups,
        torch.float64,
        placed=placement(groups.ep, slots_per_gpu, shared_is_routed=shared_is_routed),
        shared_is_routed=shared_is_routed,
        num_micro_batches=num_micro_batches,
        calls=calls,
    )
    assert gap(folder, groups, torch.float64, got) < FP64
    # Some groups have no tokens in a step, one has none at all: they call what the others call.
    assert len(calls[0]) >= 45
    assert all(ours == calls[0] for ours in calls.values())


@pytest.mark.parametrize(("num_nodes", "capacity"), [(1, 0), (2, 0), (1, 64)], ids=["direct", "by nodes", "fixed"])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_ranks_that_choose_replicas_equal_one(
    folders: Callable[..., Path], num_nodes: int, capacity: int, num_micro_batches: int
) -> None:
    groups, folder = Groups(tp=2, dp=2, ep=4, ranks_per_node=4 // num_nodes), folders(q_lora_rank=48)
    calls: dict[int, list[str]] = {}
    got = play_unit(
        folder,
        groups,
        torch.float64,
        placed=hosted_placement(
            np.random.default_rng(0).lognormal(size=(3, NUM_EXPERTS)),
            num_slots=20,
            num_gpus=4,
            active=3,
            num_nodes=num_nodes,
        ),
        active=3,
        capacity=capacity,
        num_micro_batches=num_micro_batches,
        calls=calls,
    )
    assert gap(folder, groups, torch.float64, got) < FP64
    # Before each dispatch, whatever tokens there are.
    dispatched = {"rail.all_to_all": 3, "ep.all_to_all": 2 if capacity else 3}
    num_dispatches = sum(calls[0].count(name) // each for name, each in dispatched.items())
    assert calls[0].count("counts.all_gather") == num_dispatches > 10
    assert all(ours == calls[0] for ours in calls.values())


def test_expert_parallel_ranks_equal_one_in_fp32(folders: Callable[..., Path]) -> None:
    groups, folder = Groups(tp=2, dp=2, ep=4, ranks_per_node=4), folders(q_lora_rank=48)
    got = play_unit(folder, groups, torch.float32, placed=placement(4, 3), num_micro_batches=2)
    assert gap(folder, groups, torch.float32, got) < FP32


def test_a_fixed_dispatch_equals_one_rank(folders: Callable[..., Path]) -> None:
    groups, folder = Groups(tp=2, dp=2, ep=4, ranks_per_node=4), folders(q_lora_rank=48)
    got = play_unit(folder, groups, torch.float64, placed=placement(4, 3), num_micro_batches=2, capacity=64)
    assert gap(folder, groups, torch.float64, got) < FP64


def test_rows_of_nobody_go_to_no_expert_and_count_for_none(folders: Callable[..., Path]) -> None:
    """As what fills up a captured step, on a rank that has rows of its own and on one that has none."""
    groups, folder = Groups(tp=2, dp=2, ep=4, ranks_per_node=4), folders(q_lora_rank=48)
    config, placed = ModelConfig.from_folder(folder), placement(4, 3)
    asked, rows = {name: list(range(2, 9)) for name in "abc"}, {"a": 3, "b": 4, "c": 5}

    def main(world: VirtualCollectives) -> tuple[dict[str, Tensor], list[int]]:
        experts = FixedDispatch(world.subgroup(world.ranks, "fixed"), placed.slots_per_gpu, 4)
        parallel = replace(parallel_of(world, groups, placed, False, 0, [], None), fixed=lambda capacity: experts)
        with torch.inference_mode():
            run = Paged(load_weights(folder, config, torch.float64, parallel=parallel), num_pages=10)
            run.prefill(asked)
            assert run.model.routing is not None
            run.model.routing.num_tokens_LE.zero_()
            with run.model.fixed_rows(8):
                logits = run.decode({} if groups.coordinates(world.rank).dp_rank else rows, num_padding=5)
            return logits, run.model.routing.num_tokens_LE[:2].sum(1).tolist()

    results = VirtualUnit(groups).run(main)
    single = Paged(load_weights(folder, config, torch.float64), num_pages=10)
    single.prefill(asked)
    for name, expected in single.decode(rows).items():
        assert all(torch.allclose(logits[name], expected, atol=FP64) for logits, _ in results[:2])
    # The first rank's share of eight rows are four, of which three are somebody's.
    assert [counts for _, counts in results] == [[3 * config.num_experts_per_token] * 2, [0, 0], [0, 0], [0, 0]]


def test_one_wrong_expert_shows_in_other_groups(folders: Callable[..., Path]) -> None:
    groups, folder = Groups(tp=1, dp=4, ep=4, ranks_per_node=4), folders(q_lora_rank=48)

    def spoil(rank: int, model: DeepseekV3) -> None:
        # Of the group that has no tokens itself.
        if rank == 3:
            gate_up, _ = moe_of(model, 1).expert(0)
            assert isinstance(gate_up, Tensor)
            gate_up[3] *= 1.5

    got = play_unit(folder, groups, torch.float64, placed=placement(4, 2), spoil=spoil)
    assert gap(folder, groups, torch.float64, got) > 1e-4


def test_two_processes_equal_one_and_say_what_they_hid(folders: Callable[..., Path], tmp_path: Path) -> None:
    folder = folders(q_lora_rank=48)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "serving.model.weights"])
    results = []
    ranks = []
    for rank in range(2):
        ours, theirs = context.Pipe()
        ranks.append((ours, context.Process(target=_serve, args=(theirs, folder, tmp_path.name, rank), daemon=True)))
        ranks[-1][1].start()
        theirs.close()
    try:
        for pipe, _ in ranks:
            assert pipe.poll(60.0), "a rank does not answer"
            results.append(pipe.recv())
    finally:
        for _, process in ranks:
            process.kill()
            process.join()
    groups = Groups(tp=2, dp=1, ep=2, ranks_per_node=2)
    assert gap(folder, groups, torch.float64, [[torch.from_numpy(each) for each in got] for got, _ in results]) < FP64
    for _, trace in results:
        assert 0.0 < trace["otherData"]["hidden"] < 1.0


@pytest.mark.parametrize("spoiled", [False, True])
def test_experts_that_change_places_change_nothing(folders: Callable[..., Path], spoiled: bool) -> None:
    groups, folder, before = Groups(tp=1, dp=2, ep=2, ranks_per_node=2), folders(q_lora_rank=48), placement(2, 5)
    after = Placement(slots=before.slots[:, ::-1], num_experts=NUM_EXPERTS, num_gpus=2)
    held: dict[tuple[int, int, int], tuple[list[Tensor], int]] = {}

    def exchange(rank: int, model: DeepseekV3, world: VirtualCollectives) -> None:
        """Every slot gets what the mirrored slot of the other rank held."""
        experts = model.expert_slots
        assert (experts.num_layers, experts.num_slots) == (3, 5)
        for layer, slot in itertools.product(range(3), range(5)):
            held[rank, layer, slot] = experts.read(layer, slot), experts.checksum(layer, slot)
        world.barrier()
        for layer, slot in itertools.product(range(3), range(5)):
            tensors, checksum = held[1 - rank, layer, 4 - slot]
            experts.write(layer, slot, [tensor * 1.1 for tensor in tensors] if spoiled and layer == 2 else tensors)
            assert (experts.checksum(layer, slot) == checksum) != (spoiled and layer == 2)
        assert model.routing is not None
        model.routing.place(after)
        world.barrier()

    got = play_unit(folder, groups, torch.float32, placed=before, meanwhile=exchange)
    # What is spoiled is the MTP layer, and of that only drafts depend on it.
    assert (gap(folder, groups, torch.float32, got) < FP32) != spoiled
    assert gap(folder, groups, torch.float32, [logits[:-1] for logits in got], drafts=False) < FP32


def moe_of(model: DeepseekV3, block: int) -> Moe:
    moe = model.blocks[block].mlp
    assert isinstance(moe, Moe)
    return moe


def test_ranks_read_their_parts_of_an_fp8_folder(folders: Callable[..., Path]) -> None:
    # Neither heads nor hidden sizes are whole blocks, so parts begin and end inside of them.
    overrides = {"storage": "fp8", "hidden_size": 136, "qk_nope_head_dim": 40, "v_head_dim": 56}
    folder, groups = folders(**overrides), Groups(tp=4, dp=1, ep=1, ranks_per_node=4)
    assert gap(folder, groups, torch.float64, play_unit(folder, groups, torch.float64)) < FP64


def _spoil_head(model: DeepseekV3) -> None:
    model.head.weight[3, 5] += 0.1


def _spoil_out(model: DeepseekV3) -> None:
    out = model.blocks[1].attention.out
    assert isinstance(out, Tensor)
    out[3, 5] += 0.1


def _spoil_embedding(model: DeepseekV3) -> None:
    model.embed += 0.01


@pytest.mark.parametrize("spoil", [_spoil_head, _spoil_out, _spoil_embedding])
def test_one_wrong_weight_of_one_rank_shows(folders: Callable[..., Path], spoil: Callable[[DeepseekV3], None]) -> None:
    folder, groups = folders(q_lora_rank=48), Groups(tp=2, dp=1, ep=1, ranks_per_node=2)

    def spoil_second(rank: int, model: DeepseekV3) -> None:
        if rank == 1:
            spoil(model)

    assert gap(folder, groups, torch.float64, play_unit(folder, groups, torch.float64, spoil=spoil_second)) > 1e-4


def test_shares_are_even_and_the_first_ranks_have_more() -> None:
    assert shares(10, 4) == [3, 3, 2, 2]
    assert shares(2, 4) == [1, 1, 0, 0]
    assert shares(0, 4) == [0, 0, 0, 0]


def test_heads_that_do_not_divide_are_refused(folders: Callable[..., Path]) -> None:
    class Three(SingleRank):
        @property
        def world_size(self) -> int:
            return 3

    assert SINGLE.tp.world_size == 1
    with pytest.raises(ConfigError, match=r"tp = 3 does not divide the model's 8 heads"):
        Parallel(tp=Three()).check(ModelConfig.from_folder(folders()))
