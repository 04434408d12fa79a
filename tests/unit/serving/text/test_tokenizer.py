from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from serving.core.errors import ModelFolderError, RequestError
from serving.text import markers as m
from serving.text.tokenizer import Tokenizer

TINY_CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}


def test_ids_of_the_published_tokenizer(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (0, 1, (1,))
    assert (tokenizer.vocab_size, tokenizer.num_tokens) == (128815, 128815)
    assert tokenizer.control_id(m.THINK) == 128798
    assert tokenizer.control_id(m.USER) == 128803
    assert tokenizer.control_id(m.SEP) == 128814


def test_every_marker_named_here_is_a_control_token_of_the_published_tokenizer(tokenizer: Tokenizer) -> None:
    names = [value for name, value in vars(m).items() if name.isupper()]
    assert len(names) == 15
    assert all(tokenizer.has_control(name) for name in names)
    assert not tokenizer.has_control("<｜Nobody｜>")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello, world!",
        "  two  spaces\n\n\tand tab",
        "12345678 9",
        "深度求索 你好",
        "🤷🏽‍♀️ é e\u0301",
        "def f(x):\r\n    return x",
    ],
)
def test_ordinary_text_gets_the_published_ids_and_comes_back(
    tokenizer: Tokenizer, published: tokenizers.Tokenizer, text: str
) -> None:
    ids = tokenizer.encode_text(text)
    assert ids == published.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert tokenizer.decode(ids + tokenizer.encode_text("x")) != text


def test_a_completion_prompt_is_bos_and_the_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_completion("Once") == [0, *tokenizer.encode_text("Once")]
    assert tokenizer.encode_completion("") == [0]


def test_no_added_token_can_be_written_as_text(tokenizer: Tokenizer, published: tokenizers.Tokenizer) -> None:
    controls = {tokenizer.control_id(name) for name in tokenizer.control_names}
    assert len(controls) == 818
    for name in tokenizer.control_names:
        for text in (name, f" {name}{name}\n", f"a{name}b"):
            ids = tokenizer.encode_text(text)
            assert controls.isdisjoint(ids)
            assert tokenizer.decode(ids, skip_special=False) == text
        assert not controls.isdisjoint(published.encode(name, add_special_tokens=False).ids)


@given(
    st.lists(
        st.sampled_from(["<", "｜", "User", "think", ">", "/", "▁", "tool", "sep", "|EOT|", " ", "\n", "é"]),
        max_size=30,
    )
)
def test_no_concatenation_becomes_a_control_token(tokenizer: Tokenizer, parts: list[str]) -> None:
    ids = tokenizer.encode_text("".join(parts))
    assert all(tokenizer.control_name(i) is None for i in ids)
    assert tokenizer.decode(ids, skip_special=False) == "".join(parts)


def test_a_control_token_that_merges_could_reach_is_not_reached(
    write_folder: Callable[..., Path], tiny_spec: dict[str, Any]
) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tiny_spec, TINY_CONFIG))
    control = tokenizer.control_id("<a>")
    assert control not in tokenizer.encode_text("he<a>")
    library_alone = tokenizers.Tokenizer.from_str(json.dumps(tiny_spec | {"added_tokens": []}))
    assert control in library_alone.encode("he<a>").ids


def test_control_tokens_have_their_name_as_bytes_and_only_special_ones_are_skipped(tokenizer: Tokenizer) -> None:
    think, eos = tokenizer.control_id(m.THINK), tokenizer.eos_id
    assert tokenizer.token_bytes(think) == b"<think>"
    assert tokenizer.decode([think, eos]) == "<think>"
    assert tokenizer.decode([think, eos], skip_special=False) == "<think>" + m.EOS


def test_an_id_beyond_the_vocabulary_has_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(tokenizer.vocab_size - 1) != b""


def test_every_byte_has_a_token(tokenizer: Tokenizer) -> None:
    singles = {tokenizer.token_bytes(i) for i in range(1000)}
    assert {bytes([b]) for b in range(256)} <= singles


def test_a_lone_surrogate_is_refused_and_the_tokenizer_goes_on(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode_text("broken \ud83d emoji")
    assert tokenizer.encode_text("fine")


def test_generation_config_adds_ends_of_sentence(write_folder: Callable[..., Path], tiny_spec: dict[str, Any]) -> None:
    folder = write_folder(tiny_spec, TINY_CONFIG, {"eos_token_id": [301, 299]})
    assert Tokenizer.from_folder(folder).eos_ids == (301, 299)


def test_generation_config_names_tokens_that_the_tokenizer_config_does_not(
    write_folder: Callable[..., Path], tiny_spec: dict[str, Any]
) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tiny_spec, {}, {"bos_token_id": 300, "eos_token_id": 301}))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (300, 301)


def _word_piece(spec: dict[str, Any]) -> None:
    spec["model"]["type"] = "WordPiece"


def _without_a_byte(spec: dict[str, Any]) -> None:
    del spec["model"]["vocab"]["A"]


def _foreign_token(spec: dict[str, Any]) -> None:
    spec["model"]["vocab"]["▁word"] = 400


def _without_model(spec: dict[str, Any]) -> None:
    del spec["model"]


def _merge_of_nothing(spec: dict[str, Any]) -> None:
    spec["model"]["merges"].append("q qq")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_word_piece, "byte-level BPE"),
        (_without_a_byte, "1 of the 256 byte tokens"),
        (_foreign_token, "▁word"),
        (_without_model, "not a tokenizer file"),
        (_merge_of_nothing, "refuses it"),
    ],
)
def test_a_damaged_tokenizer_file_is_named_with_its_fault(
    write_folder: Callable[..., Path], tiny_spec: dict[str, Any], damage: Callable[[dict[str, Any]], None], says: str
) -> None:
    damage(tiny_spec)
    with pytest.raises(ModelFolderError, match=says) as caught:
        Tokenizer.from_folder(write_folder(tiny_spec, TINY_CONFIG))
    assert "tokenizer.json" in str(caught.value)


@pytest.mark.parametrize("absent", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(write_folder: Callable[..., Path], tiny_spec: dict[str, Any], absent: str) -> None:
    folder = write_folder(tiny_spec, TINY_CONFIG)
    Tokenizer.from_folder(folder)
    (folder / absent).unlink()
    with pytest.raises(ModelFolderError, match=f"{absent} is missing"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("content", "says"), [('{"bos', "not valid JSON"), ("[]", "JSON list"), ("\udcff", "not valid JSON")]
)
def test_a_broken_config_is_named(
    write_folder: Callable[..., Path], tiny_spec: dict[str, Any], content: str, says: str
) -> None:
    folder = write_folder(tiny_spec, TINY_CONFIG)
    (folder / "tokenizer_config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ModelFolderError, match=says):
        Tokenizer.from_folder(folder)


def test_a_bos_that_the_tokenizer_lacks_is_named(write_folder: Callable[..., Path], tiny_spec: dict[str, Any]) -> None:
    with pytest.raises(ModelFolderError, match="'<other>'"):
        Tokenizer.from_folder(write_folder(tiny_spec, {"bos_token": "<other>", "eos_token": "</s>"}))


def test_an_end_of_sentence_that_is_no_id_is_named(
    write_folder: Callable[..., Path], tiny_spec: dict[str, Any]
) -> None:
    with pytest.raises(ModelFolderError, match="eos_token_id"):
        Tokenizer.from_folder(write_folder(tiny_spec, TINY_CONFIG, {"eos_token_id": "one"}))


def test_an_unknown_control_token_is_an_error_that_names_it(tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelFolderError, match="Nobody"):
        tokenizer.control_id("<｜Nobody｜>")
