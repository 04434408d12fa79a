"""Latents from units of one shape to units of another, every rank a process: striped over the owners, and text as of one rank."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.layout import PAGE_TOKENS, PageLayout, num_pages_for
from serving.cluster.preflight import embedded_model_dir
from serving.core.config import BalanceTable, Config, DecodeTable, KVTable, PrefillTable
from serving.engine.build import Engine, build_engine
from tests.cluster.unit_processes import UnitPair
from tests.engine_factory import GREEDY, create_loop, random_prompts
from tests.wire_client import create_config

NUM_NEW = 6
NUM_RANDOM = 24
NUM_PAGES = 128
SHAPES = {"tp2dp2": {"tp": 2, "dp": 2}, "tp1dp4": {"tp": 1, "dp": 4}}


def prompts() -> list[list[int]]:
    """64 of up to four pages, a few with beginnings in common."""
    lengths = [(5, 40, 64, 65, 20, 130, 90, 200)[index % 8] for index in range(56)]
    drawn = random_prompts(lengths, 7)
    return drawn + [[*drawn[index][:130], 3 + index] for index in (5, 7, 13, 15, 21, 23, 29, 31)]


def config_of(
    prefill: str, decode: str, *, microbatches: int = 1, balances: bool = False, checksum: str = "all"
) -> Config:
    """Each unit on two nodes of two ranks."""
    of_unit = {"ranks_per_node": 2, "microbatches": microbatches, "max_num_seqs": 24}
    config = create_config(checksum=checksum)
    of_prefill: dict[str, int] = {}
    if balances:
        # Short steps, since experts are looked at by their number.
        of_unit |= {"redundant_experts": 4, "max_num_seqs": 8}
        of_prefill = {"max_batched_tokens": 32}
        config = dataclasses.replace(config, balance=BalanceTable(threshold=1.0, min_gain=0.001))
    return dataclasses.replace(
        config,
        prefill=PrefillTable(**SHAPES[prefill], **of_unit, **of_prefill),
        decode=DecodeTable(**SHAPES[decode], **of_unit),
        kv=KVTable(prefill_pages=NUM_PAGES, decode_pages=NUM_PAGES, expected_new_tokens=NUM_NEW),
    )


@pytest.fixture(scope="module")
def alone() -> Engine:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    return build_engine(embedded_model_dir(), max_num_seqs=32, num_pages=300, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def texts(alone: Engine) -> list[list[int]]:
    return create_loop(alone).generate(prompts(), GREEDY, NUM_NEW)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(("prefill", "decode"), [("tp2dp2", "tp1dp4"), ("tp1dp4", "tp2dp2")])
def test_the_text_is_that_of_one_rank_and_each_byte_crosses_once(
    alone: Engine, texts: list[list[int]], tmp_path: Path, prefill: str, decode: str, microbatches: int
) -> None:
    config = config_of(prefill, decode, microbatches=microbatches)
    with UnitPair(config, embedded_model_dir(), tmp_path) as units:
        assert units.generate(prompts(), NUM_NEW) == texts
        units.wait_until_quiet()
        check_bytes(units, alone.layout, tp=SHAPES[decode]["tp"])
        units.drain()


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(("prefill", "decode"), [("tp2dp2", "tp1dp4"), ("tp1dp4", "tp2dp2")])
@pytest.mark.timeout(120)
def test_experts_of_two_nodes_that_are_placed_anew_meanwhile_change_no_text(
    texts: list[list[int]], tmp_path: Path, prefill: str, decode: str, microbatches: int
) -> None:
    """In both units, while requests are served: a look is every 32 steps."""
    config = config_of(prefill, decode, microbatches=microbatches, balances=True)
    with UnitPair(config, embedded_model_dir(), tmp_path) as units:
        # Each leader says its unit's version, which is 1 at the start.
        num_leaders = {"prefill": SHAPES[prefill]["dp"], "decode": SHAPES[decode]["dp"]}
        assert all(units.metric("baton_placement_version", role) <= num for role, num in num_leaders.items())
        while any(units.metric("baton_placement_version", role) <= num for role, num in num_leaders.items()):
            assert units.generate(prompts(), NUM_NEW) == texts
        assert units.generate(prompts(), NUM_NEW) == texts
        units.drain()


@pytest.mark.parametrize(("prefill", "decode"), [("tp2dp2", "tp1dp4"), ("tp1dp4", "tp2dp2")])
@pytest.mark.timeout(120)
def test_random_batches_with_idle_ranks_neither_hang_nor_differ(
    alone: Engine, tmp_path: Path, prefill: str, decode: str
) -> None:
    """For 200 steps of a DP group of the decode unit, their mean; in each batch some group has nothing to do."""
    some = prompts()[:16]
    wanted = create_loop(alone).generate(some, GREEDY, NUM_RANDOM)
    of_batch = st.tuples(st.integers(0, 7), st.integers(0, len(some) - 1), st.integers(1, NUM_RANDOM), st.booleans())

    @given(idle=st.integers(0, 7), batch=st.lists(of_batch, min_size=1, max_size=12))
    @settings(max_examples=10, deadline=None, derandomize=False, database=None)
    def ask(idle: int, batch: list[tuple[int, int, int, bool]]) -> None:
        clients = units.clients
        busy = [client for index, client in enumerate(clients) if index != idle % len(clients)]
        asked = []
        for client, prompt, num_new, at_once in batch:
            asked.append((busy[client % len(busy)], prompt, busy[client % len(busy)].submit(some[prompt], num_new)))
            if not at_once:
                asked[-1][0].pump(0.02)
        for client, prompt, request in asked:
            assert client.finish([request]) == [wanted[prompt][: request.max_new_tokens]]

    with UnitPair(config_of(prefill, decode, microbatches=2), embedded_model_dir(), tmp_path) as units:
        while units.metric("baton_step_seconds_count", "decode") < 200 * SHAPES[decode]["dp"]:
            ask()
        units.wait_until_quiet()
        units.drain()


def check_bytes(units: UnitPair, layout: PageLayout, *, tp: int) -> None:
    """What went between the units is at most all rows once (less where a beginning was there already), and tp - 1 copies of it went on."""

    def counted(kind: str) -> float:
        return units.metric("baton_kv_handoff_bytes_total", kind=kind)

    assert 0 < counted("latent") <= layout.latent_bytes(sum(map(len, prompts())))
    assert counted("latent") / layout.num_layers == counted("mtp") / layout.num_mtp_layers
    between_units = counted("latent") + counted("mtp") + counted("padding")
    assert between_units <= layout.page_bytes * sum(num_pages_for(len(prompt)) for prompt in prompts())
    assert counted("peer") == (tp - 1) * between_units


@pytest.mark.parametrize("spoils", [0, 1])
def test_a_latent_that_changes_on_its_way_changes_a_text(texts: list[list[int]], tmp_path: Path, spoils: int) -> None:
    """Leader or follower: both bring pages. Of prompts of one page, so that no chunk is computed after the change."""
    short = [index for index, prompt in enumerate(prompts()) if len(prompt) < PAGE_TOKENS]
    config = config_of("tp2dp2", "tp1dp4", checksum="off")
    with UnitPair(config, embedded_model_dir(), tmp_path, spoils=spoils) as units:
        spoilt = units.generate([prompts()[index] for index in short], NUM_NEW)
        units.drain()
    assert [text[0] for text in spoilt] == [texts[index][0] for index in short]
    assert spoilt != [texts[index] for index in short]


def test_aborts_at_random_moments_leave_no_page_behind(texts: list[list[int]], tmp_path: Path) -> None:
    draw = random.Random(3)
    with UnitPair(config_of("tp2dp2", "tp2dp2"), embedded_model_dir(), tmp_path) as units:
        clients = units.clients
        submitted = [(clients[i % 2], clients[i % 2].submit(prompt, 40)) for i, prompt in enumerate(prompts())]
        draw.shuffle(submitted)
        for number, (client, request) in enumerate(submitted):
            # Half of them before or while pages travel, however slow the machine is; the others around what came then.
            while number == len(submitted) // 2 and not units.metric("baton_kv_handoff_bytes_total", kind="peer"):
                client.pump(0.01)
            client.pump(draw.random() * 0.03)
            client.abort(request)
        units.wait_until_quiet()
        assert units.generate(prompts()[:16], NUM_NEW) == texts[:16]
        units.drain()


def test_prefill_has_its_pages_back_when_a_decode_rank_dies_and_its_unit_with_it(tmp_path: Path) -> None:
    """First a follower, who is written to like its leader; then the others, as their supervisor would end them."""
    with UnitPair(config_of("tp2dp2", "tp2dp2"), embedded_model_dir(), tmp_path) as units:
        for number, prompt in enumerate(prompts()[:40]):
            units.clients[number % 2].submit(prompt, 60)
        while not units.metric("baton_kv_handoff_bytes_total", "decode", kind="peer"):
            pass
        units.processes["decode"][1].kill()
        units.processes["decode"][1].join()
        assert units.metric("baton_kv_pages", "prefill", state="owned") > 0, "everything was over before"
        for process in units.processes["decode"]:
            process.kill()
            process.join()
        units.wait_until_quiet("prefill", timeout_s=20.0)
        units.drain("prefill")
