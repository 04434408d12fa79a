"""Makes the embedded model's tokenizer: byte-level BPE over its own texts, DeepSeek's control tokens around it.

    id 0, 1, 2            begin of sentence, end of sentence, pad
    3 .. 258              the 256 bytes
    259 .. 1006           merges
    1007 .. 1023          think, FIM, role and tool markers, in the order in which DeepSeek numbers them

The pre-tokenizer cuts as the published one does, except that every digit stands alone, which makes sums learnable.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import tokenizers

from serving.demo import facts, filler, questions, tools, words
from serving.text import markers as m
from serving.text.messages import ToolSpec
from serving.text.template import TOOLS_FORMAT, TOOLS_HEAD

PAD = "<｜▁pad▁｜>"
LOW = (m.BOS, m.EOS, PAD)
FIM = ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>")
ROUND = (
    m.CALLS_BEGIN,
    m.CALLS_END,
    m.CALL_BEGIN,
    m.CALL_END,
    m.OUTPUTS_BEGIN,
    m.OUTPUTS_END,
    m.OUTPUT_BEGIN,
    m.OUTPUT_END,
    m.SEP,
)
HIGH = (m.THINK, m.END_THINK, *FIM, m.USER, m.ASSISTANT, "<|EOT|>", *ROUND)

PUNCTUATION = r"""!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~"""
PIECES = (
    rf"[{PUNCTUATION}][A-Za-z]+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[\p{P}\p{S}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def sample_texts(seed: int, count: int) -> Iterator[str]:
    """What the merges are learned from: the texts of every kind of question, and plain words."""
    rng = Random(f"vocabulary/{seed}")
    for _ in range(count):
        yield " ".join(filler.sentence(rng) for _ in range(6))
        for fact in (facts.draw(rng) for _ in range(3)):
            yield f"{fact.sentence} {fact.question}"
        yield " ".join(words.invented_word(rng) for _ in range(2)) + " " + words.invented_word(rng).capitalize()
        for draw in (questions.greeting, questions.unknown, questions.addition, questions.repeat, tools.tool_answer):
            question = draw(rng)
            yield from (message.content for message in (*question.messages, question.reply))
            yield from (_definition(tool) for tool in question.tools)
            yield from (
                f"function\n{call.name}\n```json\n{call.arguments}\n```"
                for message in question.messages
                for call in getattr(message, "tool_calls", ())
            )
        yield TOOLS_HEAD + TOOLS_FORMAT + "tool_call_name\n```json\ntool_call_arguments\n```{additional_tool_calls}"
    yield from (" " + word for word in words.SPELLED)


def _definition(tool: ToolSpec) -> str:
    return f"\n### {tool.name}\nDescription: {tool.description}\n\nParameters: {tool.parameters}\n"


def build(seed: int = 0, size: int = 1024, count: int = 3000) -> dict[str, object]:
    """The content of `tokenizer.json` with `size` ids in all."""
    cuts = [(r"\p{N}"), CJK, "|".join(PIECES)]
    splits = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(cut), "isolated") for cut in cuts]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [*splits, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - len(HIGH),
        special_tokens=list(LOW),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(sample_texts(seed, count), trainer)
    spec: dict[str, object] = json.loads(trained.to_str())
    ids = [*range(len(LOW)), *range(size - len(HIGH), size)]
    spec["added_tokens"] = [_added(token_id, name) for token_id, name in zip(ids, (*LOW, *HIGH), strict=True)]
    return spec


def _added(token_id: int, name: str) -> dict[str, object]:
    """Flags as published: role, think and tool markers are not "special"."""
    special = name in LOW or name == "<|EOT|>"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": name not in LOW, "special": special}
    return {"id": token_id, "content": name, **flags}


def tokenizer_config(max_length: int) -> dict[str, object]:
    """The content of `tokenizer_config.json`. Its template is for other programs; ours renders natively."""
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": m.BOS,
        "eos_token": m.EOS,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }


def write(folder: Path, *, seed: int = 0, size: int = 1024, max_length: int = 8192) -> None:
    """Write both tokenizer files of a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("tokenizer.json", build(seed, size)),
        ("tokenizer_config.json", tokenizer_config(max_length)),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
