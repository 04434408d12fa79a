"""The embedded model that ships: its size and shape are those promised, and served by `serving.model` it answers right."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch
from torch import Tensor

from serving.demo import evaluate
from serving.demo.evaluate import MODEL_FOLDER
from serving.demo.export import read_model
from serving.demo.trainable import Pieces, Shape, forward
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.weights import load_weights
from serving.text.template import ChatTemplate
from serving.text.tokenizer import Tokenizer
from tests.unit.serving.model.paged import Paged

TOKENIZER = Tokenizer.from_folder(MODEL_FOLDER)


@pytest.fixture(scope="module")
def model() -> DeepseekV3:
    return load_weights(MODEL_FOLDER, ModelConfig.from_folder(MODEL_FOLDER), torch.float32)


def greedy(model: DeepseekV3, prompt: list[int]) -> tuple[list[int], Tensor, Tensor]:
    """Answer, hidden states [prompt + answer, D] and the MTP layer's choice for each token from the answer's second on."""
    paged = Paged(model)
    logits = paged.prefill({"a": prompt})["a"]
    answer = [int(logits[-1].argmax())]
    while answer[-1] != TOKENIZER.eos_id and len(answer) < 80:
        answer.append(int(paged.decode({"a": answer[-1]})["a"][-1].argmax()))
    return answer, torch.cat(paged.hidden["a"]), drafts(model, paged, prompt, answer)


def drafts(model: DeepseekV3, paged: Paged, prompt: list[int], answer: list[int]) -> Tensor:
    """Row i of (h_i, t_{i+1}) is stored in slot i + 1, as an engine does; then every draft of the answer in one batch."""
    tokens, hidden = torch.tensor([*prompt, *answer]), torch.cat(paged.hidden["a"])
    last = len(hidden)
    assert model.mtp is not None
    stored, positions = paged.rows("a", 1, last), torch.arange(last - 1)
    model.mtp.store_rows(hidden[: last - 1], tokens[1:last], positions, stored, paged.pool)
    first = len(prompt) - 1
    table = torch.tensor([paged.page_ids["a"]] * (last - 1 - first))
    chosen = slice(first, last - 1)
    return model.mtp.draft(
        hidden[chosen],
        tokens[first + 1 : last],
        positions[chosen],
        stored[chosen],
        table,
        positions[chosen] + 2,
        paged.pool,
    ).argmax(-1)


def test_files_fit_in_16_mib_and_the_shape_is_the_promised_one() -> None:
    assert sum(path.stat().st_size for path in MODEL_FOLDER.iterdir()) <= 16 << 20
    config = json.loads((MODEL_FOLDER / "config.json").read_text())
    assert config == Shape().config()
    assert config["num_hidden_layers"] >= 8
    assert config["first_k_dense_replace"] == 1
    assert config["n_routed_experts"] >= 16
    assert config["n_routed_experts"] % 16 == 0
    assert config["n_group"] >= 4
    assert config["topk_group"] < config["n_group"]
    assert config["num_nextn_predict_layers"] == 1
    assert config["quantization_config"]["fmt"] == "e4m3"
    widths = (
        "hidden_size num_attention_heads q_lora_rank kv_lora_rank intermediate_size moe_intermediate_size vocab_size"
    )
    assert all(config[name] % 8 == 0 for name in widths.split())


@pytest.mark.parametrize("kind", ["needle 256", "addition", "reverse", "greeting", "tool call", "tool answer"])
def test_the_served_model_answers_and_its_drafts_are_accepted(model: DeepseekV3, kind: str) -> None:
    draw, accepted = evaluate.draws(TOKENIZER)[kind], []

    def generate(prompt: list[int]) -> list[int]:
        answer, _, drafted = greedy(model, prompt)
        accepted.extend((drafted == torch.tensor(answer[1:])).tolist())
        return answer

    score = evaluate.evaluate(evaluate.by_ids(TOKENIZER, generate), evaluate.drawn_questions(kind, draw, 3, seed=11))
    assert score.share == 1, score.wrong
    assert len(accepted) >= 12
    assert sum(accepted) >= 0.7 * len(accepted)


def test_served_and_trained_arithmetic_agree_on_logits_and_drafts(model: DeepseekV3) -> None:
    question = evaluate.draws(TOKENIZER)["addition"](Random(3))
    prompt = ChatTemplate(TOKENIZER, "v3").render(question.messages)
    answer, hidden, drafted = greedy(model, prompt)
    ids = torch.tensor([[*prompt, *answer, 0]])
    seen: list[Tensor] = []

    def keep(x: Tensor, norm: Tensor, head: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        plain = Pieces()
        seen.append(torch.nn.functional.linear(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm, head))
        return plain.score(x, norm, head, *rest)

    weights, bias = read_model(MODEL_FOLDER, Shape())
    forward(Shape(), Pieces(score=keep), weights, bias, ids, torch.ones(ids.shape))
    main, mtp = seen
    assert (main - model.logits(hidden)).abs().max() < 1e-3
    assert torch.equal(mtp[len(prompt) - 1 : -1].argmax(-1), drafted)
    changed = {**weights, "o": weights["o"] * 1.01}
    forward(Shape(), Pieces(score=keep), changed, bias, ids, torch.ones(ids.shape))
    assert (seen[2] - model.logits(hidden)).abs().max() > 1e-3
