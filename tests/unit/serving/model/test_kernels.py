"""Which kernels a model runs on: by table, shape, dtype, device, and what is installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serving.core.config import KernelsTable
from serving.core.errors import ConfigError
from serving.kernels.libraries import DeepGemm, FlashMla
from serving.kernels.quant import Fp8Weight, quantise_rows_fp8_reference
from serving.model import deepseek_v3
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.experts import Mlp, Moe
from serving.model.kernels import KernelChoices, choose_kernels
from tests.fp8_model import WIDE
from tests.model_factory import TINY

FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
FLASH_MLA = SimpleNamespace(FlashMLASchedMeta=object, flash_mla_with_kvcache=None)
KEYS = ("mla_decode", "linear_fp8", "grouped_fp8")
SHAPE = torch.Size((128, 256))
DEEP_GEMM = SimpleNamespace(fp8_gemm_nt=None, m_grouped_fp8_gemm_nt_contiguous=None)


def model(**overrides: Any) -> ModelConfig:
    return ModelConfig.from_dict({**TINY, **WIDE, **FP8, **overrides})


def with_heads(number: int) -> ModelConfig:
    return model(num_attention_heads=number, num_key_value_heads=number)


def installed(name: str) -> Any:
    return FLASH_MLA if "flashmla" in name else DEEP_GEMM


def missing(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name!r}", name="vllm")


def choose(
    config: ModelConfig,
    *,
    dtype: str = "bfloat16",
    device: str = "cuda",
    load: Any = installed,
    **keys: str,
) -> KernelChoices:
    placed = getattr(torch, dtype), torch.device(device)
    return choose_kernels(KernelsTable(**keys), config, *placed, load=load)


def message(config: ModelConfig, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        choose(config, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A compiler where DeepGEMM looks for one."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch()
    return compiler


@pytest.mark.parametrize("heads", [16, 32, 64, 128])
def test_ours_run_where_the_table_says_so_and_nothing_is_imported(heads: int) -> None:
    asked: list[str] = []
    chosen = choose(with_heads(heads), load=asked.append, **dict.fromkeys(KEYS, "baton"))
    assert chosen.names() == dict.fromkeys(KEYS, "baton")
    assert not asked
    assert isinstance(choose(with_heads(heads), mla_decode="flashmla").mla_decode, FlashMla)


@pytest.mark.parametrize("heads", [16, 128])
def test_auto_multiplies_many_dense_rows_by_deep_gemm_and_all_else_by_ours(heads: int) -> None:
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        return installed(name)

    chosen = choose(with_heads(heads), load=load)
    assert chosen.names() == {"mla_decode": "baton", "linear_fp8": "deepgemm", "grouped_fp8": "baton"}
    assert asked == ["vllm.third_party.deep_gemm"]
    assert chosen.linear_fp8 is not None
    assert not chosen.linear_fp8.takes(63, SHAPE)
    assert chosen.linear_fp8.takes(64, SHAPE)
    for broken in ((SHAPE[0], SHAPE[1] + 16), (SHAPE[0] + 16, SHAPE[1])):
        assert not chosen.linear_fp8.takes(64, torch.Size(broken))
    named = choose(with_heads(heads), linear_fp8="deepgemm").linear_fp8
    assert named is not None
    assert named.takes(1, SHAPE)


@pytest.mark.parametrize("other", [{"dtype": "float32"}, {"device": "cpu"}, {"config": {"quantization_config": None}}])
def test_auto_imports_nothing_for_a_model_without_fp8_products(other: dict[str, Any]) -> None:
    asked: list[str] = []
    options = dict(other)
    chosen = choose(model(**options.pop("config", {})), load=asked.append, **options)
    assert chosen.names() == dict.fromkeys(KEYS, "baton")
    assert not asked


def test_auto_does_without_a_library_that_is_absent_and_says_so_of_one_that_is_broken(
    caplog: pytest.LogCaptureFixture, nvcc: Path
) -> None:
    assert choose(model(), load=missing).names() == dict.fromkeys(KEYS, "baton")
    assert not caplog.records
    assert choose(model(), load=lambda _: SimpleNamespace()).linear_fp8 is None
    assert "has no attribute" in caplog.text
    nvcc.unlink()
    assert choose(model()).linear_fp8 is None
    assert "nvcc" in caplog.text
    assert "nvcc" in message(model(), linear_fp8="deepgemm")


@pytest.mark.parametrize(
    "error", [RuntimeError("nvcc: unknown architecture"), PermissionError("its cache cannot be written")]
)
def test_a_library_that_fails_its_trial_is_done_without_unless_it_is_named(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: DeepGemm, device: torch.device) -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(DeepGemm, "try_out", fails)
    assert choose(model()).linear_fp8 is None
    assert str(error) in caplog.text
    assert str(error) in message(model(), linear_fp8="deepgemm")


def test_the_trial_knows_another_product_from_ours() -> None:
    def product(x: Any, w: Any, out: torch.Tensor, **_: Any) -> None:
        (values, scales), (w_values, w_scales) = x, w
        wide = values.float() * scales.repeat_interleave(128, 1)
        out.copy_(wide @ (w_values.float() * w_scales.repeat_interleave(128, 1)).T)

    def without_scales(x: Any, w: Any, out: torch.Tensor, **_: Any) -> None:
        product((x[0], torch.ones_like(x[1])), w, out)

    def tried(multiply: Any) -> None:
        module = SimpleNamespace(fp8_gemm_nt=multiply, m_grouped_fp8_gemm_nt_contiguous=None)
        DeepGemm(module).try_out(torch.device("cpu"))

    tried(product)
    for wrong in (without_scales, lambda *_, **__: None):
        with pytest.raises(RuntimeError, match="is off by"):
            tried(wrong)


def test_a_product_that_would_have_to_be_compiled_while_a_request_waits_is_not_the_librarys() -> None:
    rows = quantise_rows_fp8_reference(torch.randn(96, 256))
    weight = Fp8Weight(quantised=torch.zeros(128, 256).to(torch.float8_e4m3fn), scales=torch.ones(1, 2))
    library = DeepGemm(SimpleNamespace(fp8_gemm_nt=lambda *_, **__: None, m_grouped_fp8_gemm_nt_contiguous=None))
    kernels = KernelChoices(linear_fp8=library)
    assert library.takes(96, weight.shape)
    library.linear(rows, weight)
    assert library.takes(97, weight.shape)
    kernels.stop_compiling()
    assert library.takes(96, weight.shape)
    assert not library.takes(97, weight.shape)
    assert not library.takes(96, torch.Size((256, 128)))


@pytest.mark.parametrize("other", [{"dtype": "float32"}, {"device": "cpu"}, {"config": {"kv_lora_rank": 256}}])
def test_flash_mla_has_one_shape_dtype_and_device(other: dict[str, Any]) -> None:
    options = dict(other)
    text = message(model(**options.pop("config", {})), mla_decode="flashmla", **options)
    assert "kernels.mla_decode is flashmla" in text
    assert "set it to auto or baton" in text


@pytest.mark.parametrize("key", ["linear_fp8", "grouped_fp8"])
def test_deep_gemm_multiplies_what_is_fp8_on_a_gpu(key: str) -> None:
    chosen = choose(model(), **dict.fromkeys(KEYS, "baton") | {key: "deepgemm"})
    assert [name for name in ("linear_fp8", "grouped_fp8") if isinstance(getattr(chosen, name), DeepGemm)] == [key]
    for options in ({"dtype": "float32"}, {"device": "cpu"}):
        assert f"kernels.{key} is deepgemm" in message(model(), **options, **{key: "deepgemm"})
    assert "has none there" in message(model(quantization_config=None), **{key: "deepgemm"})


@pytest.mark.parametrize(("key", "value"), [("mla_decode", "flashmla"), ("linear_fp8", "deepgemm")])
def test_a_chosen_library_that_does_not_load_is_named_with_the_reason_and_the_fix(key: str, value: str) -> None:
    text = message(model(), load=missing, **{key: value})
    assert f"kernels.{key} is {value}" in text
    assert "No module named 'vllm" in text
    assert "install vLLM" in text
    older = SimpleNamespace(flash_mla_with_kvcache=None)
    assert "has no attribute" in message(model(), load=lambda _: older, **{key: value})


def test_a_model_knows_its_library_at_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepseek_v3, "keeps_fp8", lambda *_: True)
    linear, grouped = DeepGemm(DEEP_GEMM), DeepGemm(DEEP_GEMM)
    kernels = KernelChoices(linear_fp8=linear, grouped_fp8=grouped)
    made = DeepseekV3(model(), torch.bfloat16, "meta", kernels=kernels)
    for block in [*made.blocks, made.mtp.block] if made.mtp else made.blocks:
        attention, mlp = block.attention, block.mlp
        dense = mlp.shared if isinstance(mlp, Moe) else mlp
        assert isinstance(dense, Mlp)
        weights = [attention.qkv_a, attention.q_b, attention.out, dense.gate_up, dense.down]
        assert [weight.library for weight in weights if isinstance(weight, Fp8Weight)] == [linear] * 5
        if isinstance(mlp, Moe):
            assert [weight.library for weight in (mlp.gate_up, mlp.down)] == [grouped] * 2
