"""A model folder that a server can serve: random weights, the embedded model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving.demo import vocabulary
from tests.model_factory import make_checkpoint

VOCAB_SIZE = 1024


def make_served_model(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """`overrides` go into config.json. Its greedy text is noise, and the same noise every time."""
    make_checkpoint(folder, seed, vocab_size=VOCAB_SIZE, **overrides)
    vocabulary.write(folder)
    return folder
