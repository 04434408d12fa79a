"""`baton bench memory`: peak memory of each worker, against what it must hold.

    allowed = peak of a worker that has imported everything and loaded nothing + 1.3 x resident weights + pool

The first is a process that the command itself starts: an actor of Ray as a worker is, with the imports of its role and nothing else. Peaks
are VmHWM, when the server is ready and again after prompts of several lengths, when activations have come on top. The pool is by default
just large enough for the longest prompt, so that every byte of it is touched: nothing hides in what is allowed.

Beside them, not judged: what NIXL adds to the process that has loaded nothing, and each process's private memory (RssAnon), without the
pages of libraries, which workers share.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families

from kvcache.layout import PageLayout
from serving.bench.options import counts
from serving.bench.report import provenance, write_report
from serving.bench.shapes import random_prompts
from serving.bench.streams import ask_all
from serving.bench.usage import peak_bytes, private_bytes, process_name
from serving.cluster.bare_rank import bare_ranks
from serving.cluster.preflight import resolve_model_dir
from serving.cluster.served import ServedProcess
from serving.core.config import load_config
from serving.model.config import ModelConfig
from serving.model.deepseek_v3 import DeepseekV3
from serving.model.names import name_table

_WEIGHTS_FACTOR = 1.3
_RANK = "ray::Rank.run"
_NAME = "bench"


def main(argv: Sequence[str]) -> int:
    """`argv` without the command's name. JSON on standard output or in --out, a table on standard error. 1: over the gate."""
    options = _parse(argv)
    report = provenance(["baton", "bench", "memory", *argv])
    model_dir = resolve_model_dir(load_config(overrides=[f"model.dir={options.model}"]))
    model_config = ModelConfig.from_folder(model_dir)
    bare = _bare_bytes()
    peaks, private, pages = _peaks(model_dir, options.pages, options.prompt_tokens, model_config.vocab_size)
    weights = _weight_bytes(model_config)
    pool = (pages + 1) * _page_bytes(model_config)
    base = min(imported["peak"] for imported in bare)
    allowed = base + int(_WEIGHTS_FACTOR * weights) + pool
    passed = max(peaks["ready"] + peaks["served"]) <= allowed
    report |= {
        "settings": {"pages": pages, "prompt_tokens": options.prompt_tokens, "model": model_dir.name},
        "loaded_nothing_bytes": bare,
        "peak_bytes": peaks,
        "private_bytes": private,
        "weight_bytes": weights,
        "pool_bytes": pool,
        "allowed_bytes": allowed,
        "passed": passed,
    }
    _show(report)
    write_report(report, options.out)
    return 0 if passed else 1


def _bare_bytes() -> list[dict[str, int]]:
    """Of a process of each role that has loaded nothing."""
    found = []
    with bare_ranks(("prefill", "decode")) as ranks:
        for rank in ranks:
            imported = {"peak": peak_bytes(rank.pid), "private": private_bytes(rank.pid)}
            rank.open_agent()
            found.append(imported | {"peak_with_agent": peak_bytes(rank.pid)})
    return found


def _peaks(
    model_dir: Path, pages: int, prompt_tokens: Sequence[int], vocab_size: int
) -> tuple[dict[str, list[int]], list[int], int]:
    """Peak bytes of each worker, "ready" and "served", its private bytes then, and the pages of the smallest pool.

    `pages` 0: the server decides.
    """
    settings = (f"model.name={_NAME}", f"kv.prefill_pages={pages}", f"kv.decode_pages={pages}")
    arguments = ["--model", str(model_dir), *(part for setting in settings for part in ("--set", setting))]
    with ServedProcess(arguments) as server:
        ranks = _ranks(server.process.pid)
        ready = [peak_bytes(pid) for pid in ranks]
        for num_tokens in prompt_tokens:
            (prompt,) = random_prompts(1, num_tokens, min(vocab_size, 256), num_tokens)
            ask_all(server.url, [{"model": _NAME, "prompt": prompt, "max_tokens": 8, "ignore_eos": True}])
        served = [peak_bytes(pid) for pid in ranks]
        private = [private_bytes(pid) for pid in ranks]
        return {"ready": ready, "served": served}, private, _smallest_pool(server.url)


def _smallest_pool(url: str) -> int:
    pages: Counter[str] = Counter()
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").raise_for_status().text):
        for sample in family.samples:
            if sample.name == "baton_kv_pages":
                pages[sample.labels["worker"]] += int(sample.value)
    return min(pages.values())


def _ranks(root_pid: int) -> list[int]:
    """Process ids of the workers, in no order."""
    processes = psutil.Process(root_pid).children(recursive=True)
    return [process.pid for process in processes if process_name(process) == _RANK]


def _weight_bytes(config: ModelConfig) -> int:
    """In the type that a CPU computes in."""
    targets = name_table(DeepseekV3(config, torch.float32, "meta")).values()
    return sum(target.into.numel() * target.into.element_size() for target in targets if target.repeats is None)


def _page_bytes(config: ModelConfig) -> int:
    return PageLayout(
        num_layers=config.num_layers,
        num_mtp_layers=config.num_mtp_layers,
        row_width=config.latent_width,
        element_bytes=torch.float32.itemsize,
    ).page_bytes


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="baton bench memory", description="Peak memory of the workers of a server.")
    parser.add_argument(
        "--model", default="", metavar="DIR", help="Hugging Face folder; the embedded model if not given"
    )
    parser.add_argument(
        "--pages",
        type=int,
        default=72,
        help="of each pool, by default what the longest prompt touches whole; 0: as many as `baton serve` takes",
    )
    parser.add_argument(
        "--prompt-tokens", type=counts, default=[64, 512, 4096], help="asked once ready; comma-separated"
    )
    parser.add_argument("--out", type=Path, help="write the JSON here instead of standard output")
    return parser.parse_args(argv)


def _show(report: dict[str, Any]) -> None:
    def mib(values: Iterable[int]) -> str:
        return ", ".join(f"{value / 2**20:.1f}" for value in values)

    bare, peaks = report["loaded_nothing_bytes"], report["peak_bytes"]
    lines = [
        f"loaded nothing: {mib(of['peak'] for of in bare)} MiB (with NIXL's agent {mib(of['peak_with_agent'] for of in bare)}; "
        f"private {mib(of['private'] for of in bare)})",
        f"workers: ready {mib(peaks['ready'])} MiB, served {mib(peaks['served'])} MiB (private {mib(report['private_bytes'])})",
        f"weights {mib([report['weight_bytes']])}, pool {mib([report['pool_bytes']])}; allowed {mib([report['allowed_bytes']])} MiB",
    ]
    print("\n".join(lines), file=sys.stderr)
