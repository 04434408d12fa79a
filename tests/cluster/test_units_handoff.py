"""Latents from units of one shape to units of another, every rank a process: striped over the owners, and text as of one rank."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path

import pytest
import torch

from kvcache.layout import PAGE_TOKENS, PageLayout, num_pages_for
from serving.cluster.preflight import embedded_model_dir
from serving.core.config import Config, DecodeTable, KVTable, PrefillTable
from serving.engine.build import Engine, build_engine
from tests.cluster.unit_processes import UnitPair
from tests.engine_factory import GREEDY, create_loop, random_prompts
from tests.wire_client import create_config

NUM_NEW = 6
NUM_PAGES = 128
SHAPES = {"tp2dp2": {"tp": 2, "dp": 2}, "tp1dp4": {"tp": 1, "dp": 4}}


def prompts() -> list[list[int]]:
    """64 of up to four pages, a few with beginnings in common."""
    lengths = [(5, 40, 64, 65, 20, 130, 90, 200)[index % 8] for index in range(56)]
    drawn = random_prompts(lengths, 7)
    return drawn + [[*drawn[index][:130], 3 + index] for index in (5, 7, 13, 15, 21, 23, 29, 31)]


def config_of(prefill: str, decode: str, *, microbatches: int = 1, checksum: str = "all") -> Config:
    """Each unit on two nodes of two ranks."""
    of_unit = {"ranks_per_node": 2, "microbatches": microbatches, "max_num_seqs": 24}
    return dataclasses.replace(
        create_config(checksum=checksum),
        prefill=PrefillTable(**SHAPES[prefill], **of_unit),
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
        for client, request in submitted:
            client.pump(draw.random() * 0.03)
            client.abort(request)
        units.wait_until_quiet()
        assert units.metric("baton_kv_handoff_bytes_total", kind="peer") > 0, "the aborts came too early"
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
