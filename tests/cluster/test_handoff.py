"""Two workers, real sockets, real transfers, one process: the text is that of one worker, and no page is ever lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from serving.engine.build import Engine
from tests.engine_factory import create_engine, create_loop, random_prompts
from tests.wire_client import GREEDY, WorkerPair

# Lengths around the page borders, up to five pages.
LENGTHS = [1, 2, 3, 17, 63, 64, 65, 100, 127, 128, 129, 191, 192, 193, 256, 257, 300, 319, 320, 5]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return create_engine(folder, num_pages=256), create_engine(folder, num_pages=256)


@pytest.fixture
def pair(engines: tuple[Engine, Engine]) -> Iterator[Callable[..., WorkerPair]]:
    made: list[WorkerPair] = []

    def start(**options: object) -> WorkerPair:
        made.append(WorkerPair(*engines, **options))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for workers in made:
        workers.close()


def expected(engine: Engine, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """What one worker answers, without a cache and without a hand-off."""
    return create_loop(engine, prefix_cache=False).generate(prompts, GREEDY, max_new_tokens)


def mixed_prompts(seed: int) -> list[list[int]]:
    """32 prompts: all lengths, and twelve that share beginnings with one of them."""
    prompts = random_prompts(LENGTHS, seed)
    long = prompts[LENGTHS.index(320)]
    tails = random_prompts([1, 5, 40, 64, 65, 90], seed + 1)
    return prompts + [long[:128] + tail for tail in tails] + [long[:cut] for cut in (64, 128, 129, 200, 256, 320)]


@pytest.mark.parametrize(("backend", "run_ahead"), [("nixl", False), ("nixl", True), ("local", False)])
def test_the_text_of_two_workers_is_that_of_one(
    engines: tuple[Engine, Engine], pair: Callable[..., WorkerPair], backend: str, run_ahead: bool
) -> None:
    prompts = mixed_prompts(seed=3)
    wanted = expected(engines[0], prompts, 12)
    workers = pair(backend=backend, run_ahead=run_ahead)
    client = workers.client
    first = client.finish([client.submit(prompt, 12) for prompt in prompts])
    assert first == wanted
    again = client.finish([client.submit(prompt, 12) for prompt in reversed(prompts)])  # prefix hits on both sides
    assert again[::-1] == wanted
    assert workers.prefill.metric("baton_prefix_hit_tokens_total") > 0
    assert workers.decode.metric("baton_prefix_hit_tokens_total") > 0
    client.wait(workers.is_quiet, 2.0)
