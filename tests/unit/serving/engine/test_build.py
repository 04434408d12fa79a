"""Building an engine: sizes that follow from the folder and the memory, and an identity that only equal engines share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcache.layout import PageLayout
from serving.core.config import KernelsTable
from serving.core.errors import ConfigError, ModelFolderError
from serving.engine.build import Engine, _free_gpu_bytes, _num_pages, _pool, build_engine, identity, tokenizer_size
from serving.model.deepseek_v3 import DeepseekV3
from tests.engine_factory import GREEDY, create_loop
from tests.model_factory import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, seed=0)
    return folder


def _build(folder: Path, **options: Any) -> Engine:
    return build_engine(folder, **({"max_num_seqs": 2, "num_pages": 4, "dtype": "float32", "device": "cpu"} | options))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="nothing is packed without oneDNN")
def test_who_only_prefills_leaves_weights_plain(folder: Path) -> None:
    packed, plain = _weights_of(_build(folder)), _weights_of(_build(folder, decodes=False))
    assert all(weight.is_mkldnn for weight in packed)
    assert not any(weight.is_mkldnn for weight in plain)
    for a, b in zip(packed, plain, strict=True):
        assert torch.equal(a.to_dense(), b)


def _weights_of(engine: Engine) -> list[torch.Tensor]:
    model = engine.runner.model
    assert isinstance(model, DeepseekV3)
    weights = [model.head.weight, model.blocks[1].attention.qkv_a, model.blocks[1].attention.out]
    return [weight for weight in weights if isinstance(weight, torch.Tensor)]


def test_the_page_layout_follows_model_and_dtype(folder: Path) -> None:
    wide = PageLayout(num_layers=3, num_mtp_layers=1, row_width=48, element_bytes=4)
    assert _build(folder).layout == wide
    narrow = _build(folder, dtype="bfloat16", mtp=False)
    assert narrow.layout == PageLayout(num_layers=3, num_mtp_layers=0, row_width=48, element_bytes=2)
    assert narrow.pool.tensor.dtype == torch.bfloat16
    assert len(create_loop(narrow).generate([[5, 6]], GREEDY, 3)[0]) == 3


def test_a_chosen_kernel_that_a_cpu_does_not_run_is_an_error_before_weights_are_read(folder: Path) -> None:
    def told(*_: object) -> None:
        raise AssertionError("weights are read")

    progress = SimpleNamespace(start=told, advance=told, finish=told, tell=told)
    with pytest.raises(ConfigError, match=r"kernels\.mla_decode is flashmla, which attends bfloat16 rows") as caught:
        _build(folder, kernels=KernelsTable(mla_decode="flashmla"), progress=progress)
    assert caught.value.exit_code == 2
    with pytest.raises(AssertionError, match="weights are read"):
        _build(folder, progress=progress)


def test_the_longest_text_is_what_model_pool_and_configuration_allow(folder: Path) -> None:
    assert _build(folder, num_pages=4).max_model_len == 256
    assert _build(folder, num_pages=100).max_model_len == 4096
    assert _build(folder, num_pages=4, max_model_len=100).max_model_len == 100


def test_the_pool_is_sized_from_free_memory_when_no_number_is_given(folder: Path) -> None:
    small = _build(folder, num_pages=0, memory_fraction=1e-4)
    assert 1 <= small.pool.num_pages < _build(folder, num_pages=0, memory_fraction=1e-3).pool.num_pages
    with pytest.raises(ConfigError, match="memory_fraction"):
        _build(folder, num_pages=0, memory_fraction=1e-12)


def test_drafts_need_the_layer_that_makes_them(folder: Path) -> None:
    assert [_build(folder, draft_tokens=wanted).draft_tokens for wanted in ("0", "1", "3", "auto")] == [0, 1, 3, 0]
    assert _build(folder, draft_tokens="auto", mtp=False).draft_tokens == 0
    with pytest.raises(ConfigError, match=r"decode\.draft_tokens is 2, but there is no MTP layer"):
        _build(folder, draft_tokens="2", mtp=False)
    engine = _build(folder, draft_tokens="1")
    assert engine.identity == _build(folder).identity
    assert [engine.runner.step_s(1, number) for number in (0, 1)] == [1.0, float("inf")], "nothing is measured yet"
    engine.runner.warm_up(max_batched_tokens=0, decodes=True)
    assert all(0 < engine.runner.step_s(rows, number) < 5 for rows in (1, 2) for number in (0, 1))
    assert engine.runner.step_s(3, 1) == float("inf"), "there are two slots"


def test_a_rank_of_several_makes_no_drafts(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^\[decode\] draft_tokens = 2: units of several ranks make no drafts"):
        _build(folder, draft_tokens="2", lockstep=SimpleNamespace())


def test_a_copy_of_the_folder_has_the_same_identity_and_anything_else_another(folder: Path, tmp_path: Path) -> None:
    layout = PageLayout(num_layers=3, num_mtp_layers=1, row_width=48, element_bytes=4)

    def identity_of(folder: Path, layout: PageLayout = layout, dtype: torch.dtype = torch.float32) -> str:
        return identity(folder, layout, dtype=dtype)

    shutil.copytree(folder, tmp_path / "copy")
    assert identity_of(tmp_path / "copy") == identity_of(folder) == _build(folder).identity
    make_checkpoint(tmp_path / "tuned", seed=1)
    make_checkpoint(tmp_path / "rope", seed=0, rope_theta=20000)
    others = [
        identity_of(tmp_path / "tuned"),
        identity_of(tmp_path / "rope"),
        identity_of(folder, dtype=torch.bfloat16),
        identity_of(folder, PageLayout(num_layers=3, num_mtp_layers=0, row_width=48, element_bytes=4)),
        identity(folder, layout, dtype=torch.float32, fp8=True),
    ]
    assert len({identity_of(folder), *others}) == 6


def test_ids_from_the_tokenizers_size_on_are_never_sampled(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    spec = {"model": {"vocab": {chr(i): i for i in range(40)}}, "added_tokens": [{"id": 45, "content": "<x>"}]}
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(spec))
    assert tokenizer_size(tmp_path / "model") == 46
    prompts = [[i, i + 1, 7] for i in range(16)]
    free = create_loop(_build(folder, num_pages=16)).generate(prompts, GREEDY, 8)
    bounded = create_loop(_build(tmp_path / "model", num_pages=16)).generate(prompts, GREEDY, 8)
    assert max(map(max, free)) >= 46
    assert max(map(max, bounded)) < 46


def test_a_broken_tokenizer_and_a_missing_gpu_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFolderError, match=r"tokenizer\.json"):
        _build(tmp_path / "model")
    with pytest.raises(ConfigError, match="float8"):
        _build(folder, dtype="float8")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            _build(folder, device="cuda")


def test_a_gpu_that_the_kernels_are_not_for_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an older GPU")
    assert _build(folder, device="auto").pool.tensor.device.type == "cpu"
    with pytest.raises(ConfigError, match="an older GPU is not a Hopper GPU"):
        _build(folder, device="cuda")


def test_a_prefill_step_has_the_tokens_asked_for_or_what_suits_the_device(folder: Path) -> None:
    assert _build(folder, max_batched_tokens=64).max_batched_tokens == 64
    assert _build(folder).max_batched_tokens == 256


class Gpu:
    """What torch says of one, while `build` sizes a pool on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, total: int, free: int, reserved: int) -> None:
        self.reserved = self.peak = reserved
        for name, answer in {
            "reset_peak_memory_stats": lambda device: None,
            "memory_reserved": lambda device: self.reserved,
            "max_memory_reserved": lambda device: self.peak,
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: (free, total),
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)


def test_a_gpus_pool_leaves_room_for_the_largest_steps_and_for_who_shares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")

    def free_bytes(share: float, needed: int) -> int:
        gpu = Gpu(monkeypatch, total=1000, free=700, reserved=250)
        tried = []

        def try_steps() -> None:
            tried.append(True)
            gpu.peak += needed

        free = _free_gpu_bytes(device, share, try_steps)
        assert tried == [True]
        return free

    assert free_bytes(1.0, 100) == 600
    assert free_bytes(0.5, 100) == 500 - 250 - 100  # the other may not have loaded yet
    assert free_bytes(1.0, 800) == -100


def test_a_pool_that_would_be_empty_says_what_is_missing() -> None:
    layout = PageLayout(num_layers=1, num_mtp_layers=0, row_width=4096, element_bytes=4)
    assert _num_pages(layout, 0.5, 3 * layout.page_bytes) == 1
    with pytest.raises(
        ConfigError, match=r"kv\.memory_fraction 0\.1 of 5 MiB holds no page of 1048576 bytes; raise it"
    ):
        _num_pages(layout, 0.1, 5 << 20)
    with pytest.raises(ConfigError, match="largest steps 0 MiB are left"):
        _num_pages(layout, 0.9, -5)


def test_a_pool_that_does_not_fit_a_gpu_names_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    Gpu(monkeypatch, total=1 << 30, free=5 << 20, reserved=0)
    monkeypatch.setattr("serving.engine.build.KVPool", full)
    layout = PageLayout(num_layers=1, num_mtp_layers=0, row_width=1024, element_bytes=4)
    with pytest.raises(
        ConfigError, match=r"100 pages takes 25 MiB, and the GPU has 5 MiB left; lower kv\.prefill_pages"
    ):
        _pool(layout, 100, torch.float32, torch.device("cuda"))
