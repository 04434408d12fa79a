"""Logits equal transformers' DeepseekV3ForCausalLM, whichever way the tokens go through the cache."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.kernels import mla
from serving.model import deepseek_v3
from serving.model.batch import PrefillContext
from serving.model.config import ModelConfig
from serving.model.weights import load_weights
from tests.model_factory import YARN, make_checkpoint
from tests.unit.serving.model.paged import Paged

TOLERANCE = 1e-4

# name -> what differs from model_factory.TINY
CONFIGS: dict[str, dict[str, Any]] = {
    "q_lora, 4 groups, yarn, 1 dense": {},
    "plain q_proj, 1 group, no yarn, 0 dense": {
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "rope_scaling": None,
        "first_k_dense_replace": 0,
    },
    "8 groups, 3 dense, 2 shared": {
        "num_hidden_layers": 5,
        "first_k_dense_replace": 3,
        "n_routed_experts": 16,
        "n_group": 8,
        "topk_group": 3,
        "num_experts_per_tok": 4,
        "n_shared_experts": 2,
    },
    "3 heads, values wider than keys": {"num_attention_heads": 3, "num_key_value_heads": 3, "v_head_dim": 48},
    "8 heads, large ranks, theta 50000": {
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "kv_lora_rank": 96,
        "q_lora_rank": 80,
        "rope_theta": 50000,
    },
    "plain q_proj under yarn without mscale, top-1": {
        "q_lora_rank": None,
        "rope_scaling": {key: YARN[key] for key in ("type", "factor", "original_max_position_embeddings")},
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
    },
    "newer rope_parameters, mscale differing": {
        "rope_scaling": None,
        "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 10000.0, "mscale": 0.7, "mscale_all_dim": 0.9},
        "routed_scaling_factor": 1.0,
    },
    "all layers MoE, 32 experts, odd sizes": {
        "first_k_dense_replace": 0,
        "n_routed_experts": 32,
        "num_experts_per_tok": 5,
        "hidden_size": 72,
        "moe_intermediate_size": 20,
        "vocab_size": 131,
    },
    "dense only": {"first_k_dense_replace": 3, "qk_rope_head_dim": 8, "qk_nope_head_dim": 40},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def oracle(folder: Path) -> Any:
    """transformers' model over the same folder."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def oracle_logits(model: Any, token_ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def paged(folder: Path, **kwargs: Any) -> Paged:
    return Paged(load_weights(folder, ModelConfig.from_folder(folder), torch.float32), **kwargs)


def random_ids(vocab: int, count: int, seed: int) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def gap(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    difference = (got - want).abs().max()
    return float(difference) if torch.isfinite(difference) else float("inf")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers_in_one_piece_in_chunks_and_step_by_step(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path, seed=list(CONFIGS).index(name), **CONFIGS[name])
    reference = oracle(tmp_path)
    vocab = reference.config.vocab_size
    texts = {"a": random_ids(vocab, 150, 1), "b": random_ids(vocab, 31, 2), "c": random_ids(vocab, 75, 3)}
    want = {text: oracle_logits(reference, ids) for text, ids in texts.items()}

    whole = paged(tmp_path)
    for text, logits in whole.prefill(texts).items():
        assert gap(logits, want[text]) < TOLERANCE, f"{text} in one piece"

    steps = paged(tmp_path, seed=1)
    got: dict[str, list[Tensor]] = {text: [] for text in texts}

    def collect(logits: dict[str, Tensor]) -> None:
        for text, part in logits.items():
            got[text].append(part)

    collect(steps.prefill({"a": texts["a"][:40], "b": texts["b"][:1]}))
    collect(steps.prefill({"c": texts["c"][:63], "a": texts["a"][40:141], "b": texts["b"][1:30]}))
    collect(steps.prefill({"c": texts["c"][63:66]}))
    collect(steps.decode({"b": texts["b"][30], "a": texts["a"][141], "c": texts["c"][66]}, num_padding=2))
    for i in range(8):
        collect(steps.decode({"a": texts["a"][142 + i], "c": texts["c"][67 + i]}))
    for text in texts:
        assert gap(torch.cat(got[text]), want[text]) < TOLERANCE, f"{text} in pieces"


def test_a_recomputed_token_sees_the_cache_and_leaves_it_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, seed=3)
    ids = random_ids(128, 128, 4)
    first = paged(tmp_path)
    want = first.prefill({"a": ids})["a"][-1:]
    kept = first.pool[first.page_ids["a"]].clone()
    first.tokens["a"] = ids[:127]
    again = first.prefill({"a": ids[127:]}, store_from=128)["a"]
    assert gap(again, want) < TOLERANCE
    # Only the main model's layers are stored here; the MTP layer stays NaN.
    assert torch.equal(first.pool[first.page_ids["a"]].nan_to_num(7.0), kept.nan_to_num(7.0))


def _begun(folder: Path, ids: list[int]) -> Paged:
    """Of "a" 200 tokens are cached, of "b" 5, of "c" 64."""
    run = paged(folder)
    run.prefill({"a": ids[:200], "b": ids[:5], "c": ids[:64]})
    return run


@pytest.mark.parametrize("expanded_bytes", [1, deepseek_v3._EXPANDED_PREFIX_BYTES_CPU])
@pytest.mark.parametrize("capacity", [269, 512])
def test_a_context_whose_length_the_host_does_not_say_gives_the_same_hidden_states_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capacity: int, expanded_bytes: int
) -> None:
    make_checkpoint(tmp_path, seed=4)
    ids = random_ids(128, 230, 4)
    chunks = {"a": ids[200:230], "new": ids[:20], "b": ids[5:6], "c": ids[64:140]}
    monkeypatch.setattr(deepseek_v3, "_EXPANDED_PREFIX_BYTES_CPU", expanded_bytes)
    by_parts, packed = _begun(tmp_path, ids), _begun(tmp_path, ids)
    want, got = by_parts.prefill(chunks), packed.prefill(chunks, capacity=capacity)
    for name in chunks:
        assert gap(got[name], want[name]) < TOLERANCE, name
        assert gap(packed.hidden[name][-1], by_parts.hidden[name][-1]) < TOLERANCE, name
        # The MTP layer's rows, the last, are not the model's to store.
        ours, theirs = (
            run.pool[:, :-1].transpose(0, 1).flatten(1, 2)[:, run.rows(name, 0, len(run.tokens[name]))]
            for run in (packed, by_parts)
        )
        assert gap(ours, theirs) < TOLERANCE, name


def test_one_wrong_row_of_a_context_shows_in_its_sequence_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, seed=4)
    ids = random_ids(128, 230, 4)
    chunks = {"a": ids[200:230], "new": ids[:20], "b": ids[5:6], "c": ids[64:140]}
    want = _begun(tmp_path, ids).prefill(chunks, capacity=300)
    run = _begun(tmp_path, ids)
    right = run._packed_context

    def wrong(names: list[str], capacity: int) -> PrefillContext:
        context = right(names, capacity)
        # The third row of "b" is its second.
        context.slots_C[202] = context.slots_C[201]
        return context

    monkeypatch.setattr(run, "_packed_context", wrong)
    got = run.prefill(chunks, capacity=300)
    assert gap(got["b"], want["b"]) > TOLERANCE
    for name in ("a", "new", "c"):
        assert gap(got[name], want[name]) < TOLERANCE, name


def test_bounded_memory_gives_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, seed=4)
    ids = random_ids(128, 300, 4)
    want = oracle_logits(oracle(tmp_path), ids)
    # So little that a prefix is expanded 64 rows at a time, and a decode batch is gathered one sequence at a time.
    monkeypatch.setattr(deepseek_v3, "_EXPANDED_PREFIX_BYTES_CPU", 1)
    monkeypatch.setattr(mla, "_GATHER_BYTES", 1)
    run = paged(tmp_path)
    run.prefill({"a": ids[:200], "b": ids[:290]})
    assert gap(run.prefill({"a": ids[200:299]})["a"], want[200:299]) < TOLERANCE
    both = run.decode({"a": ids[299], "b": ids[290]})
    assert gap(both["a"], want[299:]) < TOLERANCE
    assert gap(both["b"], want[290:291]) < TOLERANCE


def test_fp64_is_exact_to_fp64_whatever_the_pieces(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, seed=10)
    ids = random_ids(128, 140, 10)
    model = load_weights(tmp_path, ModelConfig.from_folder(tmp_path), torch.float64)
    whole, pieces = Paged(model), Paged(model, seed=2)
    want = whole.prefill({"a": ids})["a"]
    parts = [pieces.prefill({"a": ids[:70]})["a"], pieces.prefill({"a": ids[70:139]})["a"]]
    parts.append(pieces.decode({"a": ids[139]})["a"])
    assert want.dtype == torch.float64
    assert gap(torch.cat(parts), want) < 1e-9


def test_one_wrong_weight_or_latent_shows(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, seed=5)
    ids = random_ids(128, 100, 5)
    want = oracle_logits(oracle(tmp_path), ids)

    wrong_latent = paged(tmp_path)
    wrong_latent.prefill({"a": ids[:99]})
    row = int(wrong_latent.rows("a", 17, 18))
    wrong_latent.pool[row // 64, 1, row % 64, 3] += 1.0
    assert gap(wrong_latent.decode({"a": ids[99]})["a"], want[99:]) > TOLERANCE

    wrong_weight = paged(tmp_path)
    wrong_weight.model.blocks[2].attention_norm[5] += 0.05
    assert gap(wrong_weight.prefill({"a": ids})["a"], want) > TOLERANCE


def test_the_batch_changes_no_greedy_token(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, seed=6)
    prompts = {f"s{i}": random_ids(128, 5 + 23 * i, 20 + i) for i in range(5)}

    def greedy(names: list[str]) -> dict[str, list[int]]:
        run = paged(tmp_path)
        logits = run.prefill({name: prompts[name] for name in names})
        texts: dict[str, list[int]] = {name: [] for name in names}
        for _ in range(24):
            last = {name: int(logits[name][-1].argmax()) for name in names}
            for name, token in last.items():
                texts[name].append(token)
            logits = run.decode(last)
        return texts

    together = greedy(list(prompts))
    for name in prompts:
        assert greedy([name])[name] == together[name]


def test_bf16_stays_near_fp32(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, seed=7, storage="bf16")
    ids = random_ids(128, 70, 7)
    config = ModelConfig.from_folder(tmp_path)
    want = Paged(load_weights(tmp_path, config, torch.float32)).prefill({"a": ids})["a"]
    run = Paged(load_weights(tmp_path, config, torch.bfloat16))
    logits = run.prefill({"a": ids[:60]})["a"], *(run.decode({"a": token})["a"] for token in ids[60:])
    # A near tie in the gate may send a bf16 token to another expert, so the median is what is bounded.
    assert float((torch.cat(logits) - want).abs().median()) < 0.1


def test_fp8_folder_equals_transformers_over_its_dequantised_weights(tmp_path: Path) -> None:
    from tests.model_factory import TINY, write_folder

    weights = make_checkpoint(tmp_path / "fp8", seed=8, storage="fp8", hidden_size=144)
    write_folder(tmp_path / "plain", {**TINY, "hidden_size": 144}, weights)
    ids = random_ids(128, 80, 8)
    want = oracle_logits(oracle(tmp_path / "plain"), ids)
    assert gap(paged(tmp_path / "fp8").prefill({"a": ids})["a"], want) < TOLERANCE


def test_logits_at_32768_tokens_equal_transformers(tmp_path: Path) -> None:
    small = {
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 0,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "hidden_size": 32,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "max_position_embeddings": 32768,
        "rope_scaling": {**YARN, "original_max_position_embeddings": 4096},
    }
    make_checkpoint(tmp_path, seed=9, **small)
    ids = random_ids(128, 32768, 9)
    want = oracle_logits(oracle(tmp_path), ids)
    run = paged(tmp_path, num_pages=520)
    parts = [run.prefill({"a": ids[:16384]})["a"], run.prefill({"a": ids[16384:32760]})["a"]]
    parts += [run.decode({"a": token})["a"] for token in ids[32760:]]
    assert gap(torch.cat(parts), want) < TOLERANCE
