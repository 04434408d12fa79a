"""Ports that cannot be had, folders that cannot be served."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from serving.cluster.placement import plan_units
from serving.cluster.preflight import check_ports, check_units, embedded_model_dir, resolve_model_dir, router_ports
from serving.core.config import load_config
from serving.core.errors import ConfigError, ModelFolderError, StartupError
from serving.model.config import ModelConfig


def test_a_free_port_passes_and_one_in_use_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StartupError, match=f"port {port} of 127.0.0.1 is in use; .*--port"):
            check_ports(load_config(overrides=[f"router.port={port}"]))
    check_ports(load_config(overrides=[f"router.port={port}"]))


def test_every_router_process_has_a_port_that_is_checked():
    while True:
        with socket.socket() as free, socket.socket() as other:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except OSError:
                continue  # somebody else's
            other.listen()
            free.close()
            config = load_config(overrides=[f"router.port={port}", "router.processes=2"])
            assert router_ports(config) == [port, port + 1]
            with pytest.raises(StartupError, match=f"port {port + 1} "):
                check_ports(config)
            return


def test_port_0_is_a_free_port_for_each():
    assert router_ports(load_config(overrides=["router.port=0", "router.processes=2"])) == [0, 0]


@pytest.mark.parametrize(
    "override", ["router.port=70000", "router.host=no.such.host.invalid", "router.host=203.0.113.1"]
)
def test_an_address_that_is_none_of_ours_says_what_to_give(override: str):
    with pytest.raises(StartupError, match=r"--(host|port)"):
        check_ports(load_config(overrides=[override]))


def test_without_a_folder_the_embedded_model_is_served():
    assert resolve_model_dir(load_config()) == embedded_model_dir()


def test_a_folder_that_is_none_says_what_to_give(tmp_path: Path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ModelFolderError, match=f"{path} .*--model DIR"):
            resolve_model_dir(load_config(overrides=[f"model.dir={path}"]))


def check(*overrides: str, num_gpus: int = 0) -> None:
    config = load_config(overrides=overrides)
    check_units(config, embedded_model_dir(), plan_units(config, num_cores=2, num_gpus=num_gpus), num_gpus=num_gpus)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("decode.units=2",),
        ("decode.dp=2", "decode.ep=1"),
        ("prefill.tp=2", "prefill.dp=2", "prefill.microbatches=2"),
        ("prefill.dp=4", "prefill.hosted_slots=12", "decode.dp=2", "decode.hosted_slots=12"),
    ],
)
def test_units_of_these_sizes_are_served(overrides: tuple[str, ...]):
    check(*overrides)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_what_the_engine_cannot_do_yet_is_not_passed_over(role: str):
    with pytest.raises(StartupError, match=rf"^\[{role}\] kv_sharding = true"):
        check(f"{role}.tp=2", f"{role}.kv_sharding=true")


@pytest.mark.parametrize("override", ["decode.dispatch=symmetric", "prefill.dispatch=deepep", "decode.dispatch=nccl"])
def test_a_dispatch_of_gpus_is_refused_on_cpus(override: str):
    check("decode.dp=2", override, num_gpus=4)
    with pytest.raises(ConfigError, match=r"^\[(prefill|decode)\] dispatch = .* is for GPUs"):
        check("decode.dp=2", override)


@pytest.mark.parametrize(
    "override", ["prefill.dispatch=nccl", "prefill.tp=2", "prefill.max_num_seqs=4", "prefill.threads=1"]
)
def test_mode_both_refuses_what_it_would_pass_over(override: str):
    key, value = override.split(".")[1].split("=")
    check(override, num_gpus=4)
    with pytest.raises(
        ConfigError, match=rf"^\[prefill\] {key} = {value} with \[engine\] mode = both, .* set it there$"
    ):
        check("engine.mode=both", override, num_gpus=4)


def test_mode_both_takes_what_it_goes_by():
    check("engine.mode=both", "prefill.max_batched_tokens=512", "kv.decode_pages=100", "decode.dp=2", "prefill.units=1")
    with pytest.raises(ConfigError, match=r"^\[kv\] prefill_pages = 100 .* give decode_pages instead"):
        check("engine.mode=both", "kv.prefill_pages=100")


EXPERTS_PER_TOKEN = ModelConfig.from_folder(embedded_model_dir()).num_experts_per_token


@pytest.mark.parametrize(
    ("role", "size"), [("prefill", "prefill.max_batched_tokens"), ("decode", "decode.max_num_seqs")]
)
@pytest.mark.parametrize("tp", [1, 2])
def test_steps_for_which_a_gpu_cannot_choose_replicas_are_refused(role: str, size: str, tp: int):
    def checked(num_tokens: int, num_gpus: int = 5, hosted: int = 12) -> None:
        sizes = f"{role}.tp={tp}", f"{role}.dp={4 // tp}", f"{role}.hosted_slots={hosted}", f"{size}={num_tokens}"
        check(*sizes, num_gpus=num_gpus)

    most = (2**24 - 1) // (4 * EXPERTS_PER_TOKEN) * tp
    checked(most)
    checked(most + 1, num_gpus=0)
    checked(most + 1, hosted=0)
    with pytest.raises(ConfigError, match=rf"= {most + 1} with \[{role}\] hosted_slots: .* set it to {most} or less"):
        checked(most + 1)


def test_a_worker_that_prefills_and_decodes_has_both_sizes_checked():
    sizes = "engine.mode=both", "decode.dp=4", "decode.hosted_slots=12"
    check(*sizes, num_gpus=4)
    for size in ("prefill.max_batched_tokens=9999999", "decode.max_num_seqs=9999999"):
        with pytest.raises(ConfigError, match=r"= 9999999 with \[decode\] hosted_slots"):
            check(*sizes, size, num_gpus=4)


def test_more_ranks_than_a_gpu_chooses_replicas_for_are_refused_before_they_start():
    sizes = "prefill.dp=64", "prefill.ranks_per_node=64", "prefill.redundant_experts=48", "prefill.hosted_slots=3"
    with pytest.raises(ConfigError, match=r"^\[prefill\] hosted_slots = 3 with ep = 64: on GPUs .* up to 32 ranks"):
        check(*sizes, num_gpus=65)
    check(*sizes)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_experts_that_do_not_fit_their_nodes_are_refused_before_they_are_loaded(role: str):
    sizes = f"{role}.dp=4", f"{role}.ranks_per_node=1"
    check(*sizes)
    check(f"{role}.dp=4", f"{role}.redundant_experts=16")
    with pytest.raises(
        ConfigError, match=rf"^\[{role}\] redundant_experts = 16: .* 8 slots a GPU for 4 .*; lower redundant"
    ):
        check(*sizes, f"{role}.redundant_experts=16")


@pytest.mark.parametrize(
    ("sizes", "fix"),
    [
        (("dp=2", "redundant_experts=16"), "every GPU holds all 16; give fewer redundant_experts"),
        (("dp=16", "ranks_per_node=16"), "each of 16 GPUs holds one of 16 experts, .* a smaller ep"),
    ],
)
def test_balancing_that_could_change_nothing_is_refused_with_the_key_that_switches_it_off(
    sizes: tuple[str, ...], fix: str
):
    overrides = [f"decode.{size}" for size in sizes]
    with pytest.raises(
        ConfigError, match=rf"^\[decode\] experts cannot be balanced: {fix}, or set balance.period_s to 0$"
    ):
        check(*overrides)
    check(*overrides, "balance.period_s=0")
    check("decode.dp=2", "decode.ep=1")


@pytest.mark.parametrize(
    ("override", "fix"),
    [("decode.dp=2", "set it to 0 or auto, or tp and ep to 1"), ("model.mtp=false", "model.mtp = true")],
)
def test_drafts_that_nobody_can_make_are_refused(override: str, fix: str):
    check("decode.draft_tokens=2")
    check("decode.draft_tokens=2", "decode.dp=2", "decode.ep=1")
    check("decode.draft_tokens=auto", override)
    with pytest.raises(ConfigError, match=rf"^\[decode\] draft_tokens = 2: .* {fix}$"):
        check("decode.draft_tokens=2", override)


def test_sizes_that_do_not_fit_the_model_are_found_before_it_is_loaded():
    with pytest.raises(ConfigError, match=r"^\[decode\] tp = 16"):
        check("decode.tp=16", "decode.ranks_per_node=16")


def test_more_ranks_than_gpus_are_refused_where_they_cannot_share():
    check("decode.dp=3", "decode.ep=1", num_gpus=4)
    with pytest.raises(StartupError, match=r"5 ranks with a GPU each, .* this machine of 4 GPUs"):
        check("decode.dp=4", "decode.ep=1", num_gpus=4)
    with pytest.raises(StartupError, match="on 2 nodes at least"):
        check("decode.dp=2", "decode.ep=1", "decode.ranks_per_node=1", num_gpus=4)
    check("decode.units=9", num_gpus=4)
