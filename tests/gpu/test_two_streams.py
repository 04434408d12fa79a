"""Two micro-batches on a GPU, whose rows travel on NCCL's stream while kernels compute: they say what one says, time after time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from kvcache.layout import num_pages_for
from serving.core.request import SamplingParams
from serving.engine.build import build_engine
from serving.engine.plan import PrefillChunk, SlotSpec, StepPlan, StepShape
from serving.engine.runner import Runner
from serving.kernels.attention import attend_varlen
from serving.kernels.gemm import linear
from serving.kernels.quant import Fp8Weight, QuantisedRows, quantise_block_fp8, quantise_rows_fp8
from serving.kernels.triton.device import keep_free, num_programs
from serving.model.config import ModelConfig
from serving.model.parallel import SINGLE, Parallel, num_moe_layers
from serving.model.timeline import Timeline
from serving.parallel.dispatch import DirectDispatch
from serving.parallel.distributed import TorchCollectives
from serving.parallel.placement import Placement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEMO = Path(__file__).parents[2] / "serving" / "demo" / "model"
GREEDY = SamplingParams(temperature=0.0)
LENGTHS = [700, 65, 300, 128, 5, 640, 64, 200]
REPEATS = 20


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("num_sms", [8, 32, 131])
def test_kernels_that_leave_processors_free_say_the_same_bits(num_sms: int) -> None:
    x, w = randn(3000, 1024, seed=0), randn(4096, 1024, seed=1)
    values, scales = quantise_block_fp8(w.float(), (128, 128))
    rows = quantise_rows_fp8(x)
    q, k, v = randn(1500, 16, 192, seed=2), randn(1500, 16, 128, seed=3), randn(1500, 16, 128, seed=4)
    rope, starts = randn(1500, 64, seed=5), torch.tensor([0, 700, 1500], dtype=torch.int32, device="cuda")

    def computed() -> list[Tensor]:
        assert isinstance(rows, QuantisedRows)
        weight = Fp8Weight(quantised=values, scales=scales)
        attended, lse = attend_varlen(q, k, rope, v, starts, starts, scale=0.07, causal=True)
        return [linear(x, w), linear(rows, weight), attended, lse]

    wanted, all_programs = computed(), num_programs(x.device)
    with keep_free(num_sms):
        assert num_programs(x.device) == all_programs - num_sms
        found = computed()
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(linear(x + 1, w), wanted[0])


@pytest.fixture(scope="module")
def ep(tmp_path_factory: pytest.TempPathFactory) -> TorchCollectives:
    """A group of one: its rows travel on NCCL's stream all the same."""
    store = FileStore(str(tmp_path_factory.mktemp("nccl") / "store"), 1)
    return TorchCollectives(backend="nccl", store=store, ranks=[0], rank=0, name="ep", deadline_s=60.0)


def parallel_over(ep: TorchCollectives, free_sms: int) -> Parallel:
    config = ModelConfig.from_folder(DEMO)
    num_experts = config.num_routed_experts
    slots = np.tile(np.arange(num_experts), (num_moe_layers(config), 1))
    placement = Placement(slots=slots, num_experts=num_experts, num_gpus=1)
    return Parallel(experts=DirectDispatch(ep, num_experts), placement=placement, free_sms=free_sms)


def runner_with(parallel: Parallel, dtype: str) -> Runner:
    engine = build_engine(DEMO, max_num_seqs=16, num_pages=256, dtype=dtype, device="cuda", parallel=parallel)
    engine.pool.poison_all()
    return engine.runner


def prefilled(runner: Runner, micro_batches: int, free_sms: int = 0) -> tuple[list[int], Tensor]:
    """The first token of each prompt, and the latents that were stored."""
    generator = torch.Generator().manual_seed(7)
    chunks, num_pages = [], 0
    for slot, length in enumerate(LENGTHS):
        prompt = torch.randint(2, 256, (length,), generator=generator).tolist()
        pages = list(range(num_pages, num_pages := num_pages + num_pages_for(length)))
        runner.open_slot(slot, SlotSpec(sampling=GREEDY, token_ids=prompt, num_prompt_tokens=length, page_ids=pages))
        chunks.append(PrefillChunk(slot=slot, token_ids=prompt, start=0, store_from=0, page_ids=pages, sample=True))
    plan = StepPlan(chunks=tuple(chunks))
    shape = StepShape(prefill_tokens=plan.num_prefill_tokens, num_micro_batches=micro_batches)
    result = runner.settle(runner.launch(plan, shape))
    by_slot = {token.slot: token.token_id for token in result.tokens}
    for slot in range(len(LENGTHS)):
        runner.close_slot(slot)
    return [by_slot[slot] for slot in range(len(LENGTHS))], rows_of(runner, LENGTHS)


def rows_of(runner: Runner, lengths: Sequence[int]) -> Tensor:
    """Those of the main layers; what lies past a text is nobody's."""
    parts, page, num_layers = [], 0, ModelConfig.from_folder(DEMO).num_layers
    for length in lengths:
        pages = runner.kv_pool[page : page + num_pages_for(length), :num_layers]
        parts.append(pages.transpose(0, 1).flatten(1, 2)[:, :length].clone())
        page += num_pages_for(length)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("free_sms", [0, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_micro_batches_say_what_one_says(ep: TorchCollectives, dtype: str, free_sms: int) -> None:
    alone_tokens, alone_rows = prefilled(runner_with(SINGLE, dtype), 1)
    runner = runner_with(parallel_over(ep, free_sms), dtype)
    tolerance = 1e-3 if dtype == "float32" else 0.15
    one_tokens, one_rows = prefilled(runner, 1)
    two_tokens, two_rows = prefilled(runner, 2)
    scale = alone_rows.float().abs().max()
    for rows in (one_rows, two_rows):
        assert (rows.float() - alone_rows.float()).abs().max() < tolerance * scale
    if dtype == "float32":
        assert one_tokens == alone_tokens
        assert two_tokens == alone_tokens
    # Whoever reads rows before they have come, or memory that another stream still uses, does so now and then.
    for _ in range(REPEATS):
        again_tokens, again_rows = prefilled(runner, 2)
        assert again_tokens == two_tokens
        assert torch.equal(again_rows, two_rows)


def test_a_timeline_of_the_device_knows_what_was_waited_for(ep: TorchCollectives) -> None:
    runner = runner_with(parallel_over(ep, 8), "float32")
    prefilled(runner, 2)
    taken = Timeline(device=torch.device("cuda"))
    model = runner.model
    each = model.prefill_each
    model.prefill_each = lambda batches, pool: each(batches, pool, timeline=taken)  # type: ignore[attr-defined, call-arg, method-assign]
    prefilled(runner, 2)
    assert 0.0 < taken.exposed_s <= taken.in_flight_s
    kinds = {event["cat"] for event in taken.chrome_trace()["traceEvents"]}
    assert kinds == {"compute", "in flight", "wait"}
