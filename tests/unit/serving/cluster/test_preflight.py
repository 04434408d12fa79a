"""Ports that cannot be had, folders that cannot be served."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from serving.cluster.preflight import check_ports, embedded_model_dir, resolve_model_dir, router_ports
from serving.core.config import load_config
from serving.core.errors import ModelFolderError, StartupError


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
