"""Every case by name: kernel, then format or shape."""

from __future__ import annotations

from serving.bench.kernel_cases import attention, exchange, experts, products, rows, steps
from serving.bench.kernel_cases.stage import Case, Stage


def cases(stage: Stage) -> dict[str, Case]:
    """In the order that needs each pool once."""
    families = attention, products, experts, exchange, rows, steps
    return {name: case for family in families for name, case in family.cases(stage).items()}
