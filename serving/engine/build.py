"""From a model folder to an engine: weights, page pool and runner, and the identity that two peers compare.

Sizes that the caller leaves open (0, "auto") are settled here and can be read from the `Engine`.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch

from kvcache.layout import PAGE_TOKENS, PageLayout, num_pages_for
from kvcache.pool import KVPool
from serving.core.config import BalanceTable, KernelsTable
from serving.core.errors import ConfigError, ModelFolderError
from serving.core.messages import PROTOCOL_VERSION
from serving.core.spec import WorkerSpec
from serving.engine.balancing import Balancing
from serving.engine.joining import Place, join
from serving.engine.runner import Model, Runner
from serving.engine.unit import Lockstep, MicroBatches
from serving.engine.watch import WARM_UP_DEADLINE_S
from serving.kernels.packed import packing
from serving.model.checkpoint import read_entries
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.heap import products_use_the_heap
from serving.model.kernels import choose_kernels
from serving.model.parallel import SINGLE, Parallel
from serving.model.units import check_drafts
from serving.model.weight import keeps_fp8
from serving.model.weights import Progress, load_weights

_SAMPLE_BYTES = 64 << 10
_AUTO = KernelsTable()
_COMPUTE_CAPABILITY = 9
# Long enough for the products to reach their rate; a CPU's step is also what a newcomer waits for.
_BATCHED_TOKENS = {"cpu": 256, "cuda": 8192}
# A CPU's memory is everybody's; a GPU is there to be filled, but for what longer contexts than those of the warm-up need.
_MEMORY_FRACTION = {"cpu": 0.1, "cuda": 0.9}


@dataclass(frozen=True, kw_only=True, eq=False)
class Engine:
    """What a worker runs on. `max_model_len`: longest prompt + answer, in tokens, that model and pool allow.
    `max_batched_tokens`: prefill tokens of one step. `draft_tokens`: the most that a decode step drafts a row.

    `identity` is equal for two engines whose pages mean the same: same weights, dtype, layout, MTP and protocol.
    `lockstep` None: the rank computes alone.
    """

    runner: Runner
    pool: KVPool
    layout: PageLayout
    model_config: ModelConfig
    identity: str
    max_model_len: int
    max_num_seqs: int
    max_batched_tokens: int
    draft_tokens: int
    lockstep: Lockstep | None = None
    balancing: Balancing | None = None


def build_engine(
    model_dir: str | Path,
    *,
    max_num_seqs: int,
    max_batched_tokens: int = 0,
    num_pages: int = 0,
    memory_fraction: float = 0.0,
    gpu_share: float = 1.0,
    max_model_len: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    mtp: bool = True,
    draft_tokens: str = "0",
    kernels: KernelsTable = _AUTO,
    num_threads: int = 0,
    prefills: bool = True,
    decodes: bool = True,
    parallel: Parallel = SINGLE,
    lockstep: Lockstep | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Load `model_dir` and make everything a step needs. `max_num_seqs` slots; `num_threads` 0 leaves torch's own number.

    `draft_tokens`: a number as text, at most MOST_DRAFTS, or "auto".
    `num_pages` 0: `memory_fraction` (0: what suits the device) of the memory that is free then. On a GPU that is what `gpu_share` of it
    leaves beside the weights and the largest steps, which are run to know what they take; `prefills`, `decodes`: which steps there will be.
    `parallel`, `lockstep`: this rank's part in a unit of several, all of which build their engines at once, with the same arguments; their
    pools are as large as the smallest.

    Raises ModelFolderError (also for a damaged tokenizer.json, whose size bounds what is sampled) and ConfigError.
    """
    products_use_the_heap()
    if num_threads > 0:
        torch.set_num_threads(num_threads)
    folder, torch_device = Path(model_dir), _device(device)
    torch_dtype = _dtype(dtype, torch_device)
    config = _model_config(folder, mtp=mtp)
    num_drafts = _num_drafts(draft_tokens, config)
    check_drafts(draft_tokens, alone=lockstep is None)
    chosen = choose_kernels(kernels, config, torch_dtype, torch_device, tp=parallel.tp.world_size)
    layout = _layout(config, torch_dtype)
    with packing(decodes):
        model = load_weights(
            folder, config, torch_dtype, torch_device, kernels=chosen, parallel=parallel, progress=progress
        )
    longest = max_model_len or config.max_position_embeddings
    max_batched_tokens = max_batched_tokens or _BATCHED_TOKENS[torch_device.type]
    split_rows = lockstep.micro_batches.rows if lockstep is not None else 0
    runner_of = partial(
        _runner,
        model,
        config,
        split_rows=split_rows,
        num_slots=max_num_seqs,
        vocab_size=min(config.vocab_size, tokenizer_size(folder) or config.vocab_size),
        draft_tokens=num_drafts,
    )

    def try_steps() -> None:
        runner = runner_of(KVPool(layout, 1, torch_dtype, torch_device), longest)
        _warm_up(runner, max_batched_tokens if prefills else 0, decodes=decodes, progress=progress, lockstep=lockstep)

    if not num_pages:
        fraction = memory_fraction or _MEMORY_FRACTION[torch_device.type]
        num_pages = _num_pages(layout, fraction, _free_bytes(torch_device, gpu_share, try_steps))
        num_pages = num_pages if lockstep is None else lockstep.least(num_pages)
    longest = min(longest, num_pages * PAGE_TOKENS)
    pool = _pool(layout, num_pages, torch_dtype, torch_device)
    runner = runner_of(pool, longest)
    if lockstep is not None and lockstep.watch is not None:
        lockstep.watch.also_releases(runner.release)
    return Engine(
        runner=runner,
        pool=pool,
        layout=layout,
        model_config=config,
        identity=identity(
            folder, layout, dtype=torch_dtype, fp8=keeps_fp8(config, torch_dtype, torch_device, parallel.tp.world_size)
        ),
        max_model_len=longest,
        max_num_seqs=max_num_seqs,
        max_batched_tokens=max_batched_tokens,
        draft_tokens=num_drafts,
        lockstep=lockstep,
    )


def build_engine_for(
    spec: WorkerSpec, progress: Progress | None = None, *, micro_batches: MicroBatches | None = None
) -> Engine:
    """The engine of one worker, as large as its role says; returns when all ranks of its unit have theirs. `micro_batches`: as `join` takes
    them. Raises as `build_engine` does, StartupError and RanksMissing."""
    config, prefills, decodes = spec.config, spec.role != "decode", spec.role != "prefill"
    model_config = _model_config(Path(spec.model_dir), mtp=config.model.mtp)
    place = join(spec, model_config, _device(config.model.device), micro_batches=micro_batches)
    try:
        engine = build_engine(
            spec.model_dir,
            max_batched_tokens=config.prefill.max_batched_tokens,
            max_num_seqs=config.decode.max_num_seqs if decodes else config.prefill.max_num_seqs,
            num_pages=config.kv.decode_pages if decodes else config.kv.prefill_pages,
            memory_fraction=config.kv.memory_fraction,
            gpu_share=spec.gpu_share,
            max_model_len=config.model.max_model_len,
            device=config.model.device,
            dtype=config.model.dtype,
            mtp=config.model.mtp,
            draft_tokens=config.decode.draft_tokens if decodes else "0",
            kernels=config.kernels,
            num_threads=spec.num_threads,
            prefills=prefills,
            decodes=decodes,
            parallel=place.parallel,
            lockstep=place.lockstep,
            progress=progress,
        )
        num_tokens = engine.max_batched_tokens if prefills else 0
        _warm_up(engine.runner, num_tokens, decodes=decodes, progress=progress, lockstep=place.lockstep)
    except torch.OutOfMemoryError:
        raise ConfigError(
            "the GPU's memory is full before the first step; lower kv.memory_fraction or prefill.max_batched_tokens"
        ) from None
    if place.lockstep is not None:
        place.lockstep.meet()
    if place.ep is None or not config.balance.period_s:
        return engine
    return dataclasses.replace(engine, balancing=_balancing(engine, place, config.balance))


def _balancing(engine: Engine, place: Place, table: BalanceTable) -> Balancing:
    assert isinstance(engine.runner.model, DeepseekV3)
    assert place.ep is not None
    assert place.lockstep is not None
    balancing = Balancing(engine.runner.model, place.shape, place.ep, table, data=place.ep_data)
    place.lockstep.attach(balancing, place.ep.ranks)
    return balancing


def tokenizer_size(folder: Path) -> int | None:
    """One more than the largest id in tokenizer.json; None where the folder has none. Read as JSON: no worker encodes text."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        spec = json.loads(path.read_bytes())
        added = [int(token["id"]) for token in spec.get("added_tokens", ())]
        return 1 + max(added + [int(token_id) for token_id in spec["model"]["vocab"].values()])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelFolderError(f"{path} is not a tokenizer with a vocabulary; fetch it again") from None


def identity(folder: Path, layout: PageLayout, *, dtype: torch.dtype, fp8: bool = False) -> str:
    """32 hex digits over config.json, tensor names, types and shapes, samples of each shard, page layout, dtype and protocol.

    `fp8`: whether products run on FP8 weights, which rounds the latents they make.

    The samples (beginning, middle, end) are there because fine-tuned models share every name and shape with their base.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update((folder / "config.json").read_bytes())
    entries = read_entries(folder)
    for name in sorted(entries):
        digest.update(f"{name} {entries[name].dtype} {entries[name].shape}\n".encode())
    for shard in sorted({entry.shard for entry in entries.values()}):
        _hash_samples(digest, shard)
    digest.update(f"{layout.identity} dtype={dtype} fp8={fp8} protocol={PROTOCOL_VERSION}".encode())
    return digest.hexdigest()


def _hash_samples(digest: hashlib.blake2b, shard: Path) -> None:
    num_bytes = shard.stat().st_size
    digest.update(f"{shard.name} {num_bytes}\n".encode())
    with shard.open("rb") as file:
        for start in (0, num_bytes // 2, max(num_bytes - _SAMPLE_BYTES, 0)):
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))


def _device(name: str) -> torch.device:
    """The kernels are Hopper's (sm_90); on another GPU "auto" is the CPU."""
    has_gpu = torch.cuda.is_available()
    fits = has_gpu and torch.cuda.get_device_capability()[0] == _COMPUTE_CAPABILITY
    if name == "auto":
        name = "cuda" if fits else "cpu"
    if name == "cuda" and not has_gpu:
        raise ConfigError("model.device is cuda but torch finds no GPU; set model.device to cpu or auto")
    if name == "cuda" and not fits:
        raise ConfigError(
            f"model.device is cuda but {torch.cuda.get_device_name()} is not a Hopper GPU (H100, H200), which the kernels "
            "are for; set model.device to cpu or auto"
        )
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name not in known:
        raise ConfigError(f"model.dtype is {name!r}; known are auto, {', '.join(known)}")
    if name == "float64" and device.type == "cuda":
        raise ConfigError("model.dtype float64 is for a CPU; no GPU kernel has it")
    return known[name]


def _model_config(folder: Path, *, mtp: bool) -> ModelConfig:
    config = ModelConfig.from_folder(folder)
    return config if mtp else dataclasses.replace(config, num_mtp_layers=0)


def _layout(config: ModelConfig, dtype: torch.dtype) -> PageLayout:
    return PageLayout(
        num_layers=config.num_layers,
        num_mtp_layers=config.num_mtp_layers,
        row_width=config.latent_width,
        element_bytes=dtype.itemsize,
    )


def _runner(
    model: Model,
    config: ModelConfig,
    pool: KVPool,
    longest: int,
    *,
    num_slots: int,
    vocab_size: int,
    draft_tokens: int,
    split_rows: int,
) -> Runner:
    """For texts of up to `longest` tokens."""
    return Runner(
        model,
        pool.tensor,
        num_slots=num_slots,
        max_pages=num_pages_for(longest),
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        draft_tokens=draft_tokens,
        split_rows=split_rows,
    )


def _warm_up(
    runner: Runner, max_batched_tokens: int, *, decodes: bool, progress: Progress | None, lockstep: Lockstep | None
) -> None:
    """Of a unit on all ranks at once, since what is compiled and captured has their collectives in it."""
    told = progress.tell if progress is not None else lambda _: None
    if lockstep is not None:
        # How much later than another a rank has loaded is no matter of the device's deadlines.
        lockstep.meet()
    with lockstep.on_device(WARM_UP_DEADLINE_S) if lockstep is not None else nullcontext():
        runner.warm_up(max_batched_tokens=max_batched_tokens, decodes=decodes, told=told)


def _num_drafts(wanted: str, config: ModelConfig) -> int:
    if wanted == "auto":
        return 0
    if wanted != "0" and not config.num_mtp_layers:
        raise ConfigError(
            f"decode.draft_tokens is {wanted}, but there is no MTP layer to draft with: set it to auto or 0, or serve a "
            "model that has one with model.mtp = true"
        )
    return int(wanted)


def _num_pages(layout: PageLayout, memory_fraction: float, free_bytes: int) -> int:
    num_pages = int(free_bytes * memory_fraction) // layout.page_bytes
    if num_pages >= 1:
        return num_pages
    if free_bytes >= layout.page_bytes:
        raise ConfigError(
            f"kv.memory_fraction {memory_fraction} of {free_bytes >> 20} MiB holds no page of {layout.page_bytes} bytes; raise it"
        )
    raise ConfigError(
        f"beside the model and its largest steps {max(free_bytes, 0) >> 20} MiB are left, and a page takes {layout.page_bytes} bytes; free "
        "memory, start fewer workers on the device, or lower prefill.max_batched_tokens"
    )


def _free_bytes(device: torch.device, gpu_share: float, try_steps: Callable[[], None]) -> int:
    if device.type == "cpu":
        return psutil.virtual_memory().available
    return _free_gpu_bytes(device, gpu_share, try_steps)


def _free_gpu_bytes(device: torch.device, share: float, try_steps: Callable[[], None]) -> int:
    """What weights and the largest steps leave of `share` of the GPU's memory, whoever else uses it. May be below 0."""
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_reserved(device)
    try_steps()
    needed = torch.cuda.max_memory_reserved(device) - held
    gc.collect()  # a runner and its captured steps hold each other
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    if share < 1:
        # Who shares the GPU may not have taken its part yet.
        free = min(free, int(total * share) - torch.cuda.memory_reserved(device))
    return free - needed


def _pool(layout: PageLayout, num_pages: int, dtype: torch.dtype, device: torch.device) -> KVPool:
    try:
        return KVPool(layout, num_pages, dtype, device)
    except torch.OutOfMemoryError:
        free = torch.cuda.mem_get_info(device)[0]
        raise ConfigError(
            f"a pool of {num_pages} pages takes {(num_pages + 1) * layout.page_bytes >> 20} MiB, and the GPU has {free >> 20} MiB left; "
            "lower kv.prefill_pages and kv.decode_pages, or kv.memory_fraction where they are 0"
        ) from None
