"""Types of command-line options that several benchmarks share."""

from __future__ import annotations

import argparse


def count(text: str) -> int:
    """1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count; give 1 or more")
    return value


def counts(text: str) -> list[int]:
    """Comma-separated."""
    return [count(part) for part in text.split(",")]
