"""The tokenizer of a model folder: text to ids, ids to bytes.

Two kinds of ids never mix. *Text* ids come from byte-level BPE over a copy of the vocabulary without any added token,
so no text, whoever wrote it, can become a control token (the library's `encode_special_tokens` is not enough: added
tokens that are not flagged special, such as `<think>` and the tool markers, are still recognised). *Control* ids are
looked up by name.

Must not know: chat formats, requests, HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from serving.core.errors import ModelFolderError, RequestError
from serving.text import markers


def byte_alphabet() -> dict[str, int]:
    """The 256 characters that byte-level BPE writes bytes as: printable Latin-1 stands for itself, the rest moves up
    from U+0100 in order (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


class Tokenizer:
    """Byte-level BPE with control tokens kept apart. Immutable; safe to share between threads."""

    def __init__(
        self,
        plain: tokenizers.Tokenizer,
        added: dict[str, int],
        special_ids: frozenset[int],
        bos_id: int,
        eos_ids: tuple[int, ...],
    ) -> None:
        """`plain` knows no entry of `added`; `special_ids` are those flagged special; `eos_ids` end a text, first the
        tokenizer's own. Use `from_folder`."""
        self._plain = plain
        self._control_ids = added
        self._control_texts = {token_id: text for text, token_id in added.items()}
        self._alphabet = byte_alphabet()
        self.special_ids = special_ids
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        ids = [*plain.get_vocab(with_added_tokens=False).values(), *added.values()]
        self.num_tokens = len(set(ids))
        self.vocab_size = max(ids) + 1

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json` and, where present, `generation_config.json` of a Hugging Face
        folder. Raises ModelFolderError when one is missing, broken, or not byte-level BPE."""
        folder = Path(path)
        spec = _read_object(folder / "tokenizer.json")
        config = _read_object(folder / "tokenizer_config.json")
        generation_path = folder / "generation_config.json"
        generation = _read_object(generation_path) if generation_path.exists() else {}
        try:
            added = {entry["content"]: int(entry["id"]) for entry in spec.get("added_tokens") or []}
            special = frozenset(int(entry["id"]) for entry in spec.get("added_tokens") or [] if entry["special"])
            plain = _without_added_tokens(spec, set(added), folder / "tokenizer.json")
        except (KeyError, TypeError, AttributeError, ValueError) as fault:
            raise ModelFolderError(
                f"{folder / 'tokenizer.json'}: not a tokenizer file ({fault!r}); download it again"
            ) from fault
        bos = _token_id(config, generation, "bos", markers.BOS, added, folder)
        eos = _token_id(config, generation, "eos", markers.EOS, added, folder)
        return cls(plain, added, special, bos[0], eos)

    @property
    def eos_id(self) -> int:
        """The end-of-sentence id of the chat formats; generation may stop at any of `eos_ids`."""
        return self.eos_ids[0]

    def control_id(self, name: str) -> int:
        """Id of a control token by its text, e.g. `<｜User｜>`. Raises ModelFolderError when the tokenizer lacks it."""
        try:
            return self._control_ids[name]
        except KeyError:
            raise ModelFolderError(
                f"the tokenizer has no control token {name!r}; use the tokenizer files published with the model"
            ) from None

    def has_control(self, name: str) -> bool:
        """Whether `control_id(name)` would succeed."""
        return name in self._control_ids

    def control_name(self, token_id: int) -> str | None:
        """Text of a control token, or None for a text id."""
        return self._control_texts.get(token_id)

    @property
    def control_names(self) -> tuple[str, ...]:
        """The text of every control (added) token."""
        return tuple(self._control_ids)

    def encode_text(self, text: str) -> list[int]:
        """Text ids only, whatever the text says. Raises RequestError for a lone surrogate, which is not text."""
        try:
            ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as fault:
            raise RequestError(
                "the text holds a lone surrogate (half of a \\ud83d\\ude00-like pair); send both halves or valid UTF-8"
            ) from fault
        return ids

    def encode_completion(self, text: str) -> list[int]:
        """The prompt of a plain completion: BOS, then the text."""
        return [self.bos_id, *self.encode_text(text)]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; a control token's are its name's. b"" for an id that names no token (the output
        layer is padded beyond the vocabulary; the sampler masks those ids)."""
        assert token_id >= 0, token_id
        control = self._control_texts.get(token_id)
        if control is not None:
            return control.encode()
        token = self._plain.id_to_token(token_id)
        return b"" if token is None else bytes(self._alphabet[char] for char in token)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD. `skip_special` leaves out the tokens flagged special (BOS, EOS,
        pad), as other implementations do, not the think and tool markers."""
        skipped = self.special_ids if skip_special else frozenset()
        return b"".join(self.token_bytes(i) for i in ids if i not in skipped).decode(errors="replace")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing; --model must name a Hugging Face model folder") from None
    except OSError as fault:
        raise ModelFolderError(f"{path} cannot be read ({fault.strerror}); check its permissions") from fault
    except ValueError as fault:
        raise ModelFolderError(f"{path} is not valid JSON ({fault}); download it again") from fault
    if not isinstance(value, dict):
        raise ModelFolderError(f"{path} holds a JSON {type(value).__name__}, not an object; download it again")
    return value


def _without_added_tokens(spec: dict[str, Any], added: set[str], path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of `spec` without its added tokens, also not as vocabulary entries that merges could reach."""
    model = spec["model"]
    if model.get("type") != "BPE" or '"ByteLevel"' not in json.dumps(spec.get("pre_tokenizer")):
        raise ModelFolderError(f"{path}: only byte-level BPE tokenizers are served; use a DeepSeek-V3 family folder")
    vocab = {token: token_id for token, token_id in model["vocab"].items() if token not in added}
    alphabet = byte_alphabet()
    missing = [char for char in alphabet if char not in vocab]
    if missing:
        raise ModelFolderError(f"{path}: {len(missing)} of the 256 byte tokens are missing; download it again")
    foreign = next((token for token in vocab if not alphabet.keys() >= set(token)), None)
    if foreign is not None:
        raise ModelFolderError(f"{path}: token {foreign!r} is not written in byte-level characters; download it again")
    merges = [merge for merge in model["merges"] if _merged(merge) not in added]
    text_only = spec | {"added_tokens": [], "post_processor": None, "model": model | {"vocab": vocab, "merges": merges}}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(text_only))
    except Exception as fault:  # the library raises bare Exception
        raise ModelFolderError(f"{path}: the tokenizers library refuses it ({fault}); download it again") from fault


def _merged(merge: str | list[str]) -> str:
    """Both file formats: "a b" and ["a", "b"]."""
    return merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)


def _token_id(
    config: dict[str, Any], generation: dict[str, Any], kind: str, default: str, added: dict[str, int], folder: Path
) -> tuple[int, ...]:
    """Ids of `bos` or `eos`: the tokenizer config's token first, then the generation config's id or ids."""
    named = config.get(f"{kind}_token")
    name = named.get("content") if isinstance(named, dict) else named
    listed = generation.get(f"{kind}_token_id")
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    name = name or (None if ids else default)
    if name is not None:
        if name not in added:
            raise ModelFolderError(
                f"{folder}: the {kind} token {name!r} is not among added_tokens of tokenizer.json; "
                "take both files from one model"
            )
        ids = [added[name], *ids]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ModelFolderError(f"{folder / 'generation_config.json'}: {kind}_token_id must be an id or a list of ids")
    return tuple(dict.fromkeys(ids))
