"""Metrics: the names others rely on, SLO values as bucket bounds, and texts that merge into one that a scraper can read."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.core.config import SloTable
from serving.metrics import CATALOGUE, Metrics, merge

# DESIGN section 8, name -> labels beside `worker`.
PROMISED = {
    "baton_requests_total": {"outcome"},
    "baton_requests_rejected_total": {"reason"},
    "baton_ttft_seconds": set(),
    "baton_tpot_seconds": set(),
    "baton_ttft_stage_seconds": {"stage"},
    "baton_handoff_gap_seconds": {"stage"},
    "baton_slo_total": {"slo", "met", "blame"},
    "baton_kv_pages": {"state"},
    "baton_kv_handoff_bytes_total": {"kind"},
    "baton_kv_handoff_seconds": set(),
    "baton_kv_stale_total": set(),
    "baton_expert_tokens_total": {"layer", "expert"},
    "baton_expert_balance": {"unit"},
    "baton_placement_version": {"unit"},
    "baton_spec_draft_tokens_total": set(),
    "baton_spec_accepted_tokens_total": set(),
    "baton_requests_running": {"role"},
    "baton_requests_waiting": {"role"},
    "baton_worker_up": {"worker", "role"},
}


def test_every_promised_metric_has_its_name_and_labels() -> None:
    offered = {family.name: set(family.labels) for family in CATALOGUE}
    assert {name: offered.get(name) for name in PROMISED} == PROMISED
    assert len(offered) == len(CATALOGUE), "a name stands twice"


def test_counters_add_up_gauges_stand_and_histograms_count() -> None:
    metrics = Metrics("worker", worker="decode-0")
    metrics.add("baton_kv_handoff_bytes_total", 3, kind="latent")
    metrics.add("baton_kv_handoff_bytes_total", 4, kind="latent")
    metrics.set("baton_kv_pages", 9, state="free")
    metrics.observe("baton_kv_handoff_seconds", 0.25)
    assert metrics.value("baton_kv_handoff_bytes_total", kind="latent") == 7
    assert metrics.value("baton_kv_handoff_bytes_total", kind="mtp") == 0
    assert metrics.value("baton_kv_pages", state="free") == 9
    assert metrics.value("baton_kv_handoff_seconds_count") == 1


def test_a_worker_has_no_metric_of_the_router() -> None:
    with pytest.raises(KeyError):
        Metrics("worker", worker="decode-0").add("baton_requests_total", outcome="finished")


def test_the_promised_latencies_are_bucket_bounds() -> None:
    text = Metrics("router", slo=SloTable(ttft_ms=777.0, tpot_ms=33.0)).exposition()
    assert 'baton_ttft_seconds_bucket{le="0.777"}' in text
    assert 'baton_tpot_seconds_bucket{le="0.033"}' in text
    assert 'le="0.777"' not in Metrics("router", slo=SloTable()).exposition()


def test_two_workers_and_a_router_merge_into_one_valid_text() -> None:
    workers = [Metrics("worker", worker=name) for name in ("prefill-0", 'odd "name"\n')]
    for number, worker in enumerate(workers):
        worker.set("baton_kv_pages", number, state="free")
        worker.set("baton_requests_waiting", 5, role="prefill")
        worker.observe("baton_kv_handoff_seconds", 0.1)
    router = Metrics("router")
    router.add("baton_requests_total", outcome="finished")
    router.set("baton_requests_waiting", 2, role="router")
    text = merge([router.exposition(), *(worker.exposition() for worker in workers)])
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    pages = next(family for family in families if family.name == "baton_kv_pages")
    assert {sample.labels["worker"]: sample.value for sample in pages.samples} == {
        "prefill-0": 0.0,
        'odd "name"\n': 1.0,
    }
    waiting = next(family for family in families if family.name == "baton_requests_waiting")
    assert [(sample.labels["role"], sample.value) for sample in waiting.samples] == [
        ("router", 2.0),
        ("prefill", 5.0),
        ("prefill", 5.0),
    ]
    assert not any(sample.name.endswith("_created") for family in families for sample in family.samples)
    assert merge([]) == ""
