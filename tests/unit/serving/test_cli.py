"""`baton` as a user meets it: a process, its exit code, and one line where something is wrong."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.served_model import make_served_model

CONFIGS = Path(__file__).parents[3] / "deploy" / "configs"
SHARD = "model-00002-of-00002.safetensors"


def baton(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serving", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "OMP_NUM_THREADS": "1", **environment},
    )


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a command that failed as it should: exit code 2, one line below the progress, no traceback."""
    assert done.stdout == ""
    return last_line(done.returncode, done.stderr)


def last_line(exit_code: int, errors: str) -> str:
    assert exit_code == 2, errors
    *progress, line = errors.splitlines()
    assert all(text.startswith("baton: checking ") for text in progress), errors
    assert line.startswith("baton: ")
    return line


def serve_each(folders: list[Path]) -> dict[str, tuple[int, str]]:
    """Exit code and errors of `baton serve` for each folder by its name; one process, so that torch is imported once."""
    code = """
import sys
from serving.cli import main
for folder in sys.argv[1:]:
    code = main(["serve", "--model", folder, "--port", "0"])
    print(f"== {code}", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    found, errors = {}, done.stderr
    for folder in folders:
        text, _, errors = errors.partition("== ")
        exit_code, _, errors = errors.partition("\n")
        found[folder.name] = int(exit_code), text
    return found


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    )


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def missing_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def truncated_shard(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[: len(content) // 2])


def wrong_dtype(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    save_file({name: tensor.to(torch.int32) for name, tensor in tensors.items()}, folder / SHARD)


def missing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


SPOILT = {
    unknown_architecture: "DeepseekV3ForCausalLM",
    broken_config: "config.json",
    missing_shard: SHARD,
    truncated_shard: SHARD,
    wrong_dtype: "I32",
    missing_tokenizer: "tokenizer.json",
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    good = make_served_model(tmp_path_factory.mktemp("models") / "good")
    folders = []
    for spoil in SPOILT:
        folders.append(good.with_name(spoil.__name__))
        shutil.copytree(good, folders[-1])
        spoil(folders[-1])
    return serve_each(folders)


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_serving_a_spoilt_folder_is_one_line(refusals: dict[str, tuple[int, str]], spoil: Callable[[Path], None]):
    exit_code, errors = refusals[spoil.__name__]
    assert SPOILT[spoil] in last_line(exit_code, errors)


def test_serving_what_is_no_folder_is_one_line(tmp_path: Path):
    assert "--model DIR" in only_line(baton("serve", "--model", str(tmp_path / "absent"), "--port", "0"))


def test_serving_on_a_port_in_use_is_one_line_before_anything_starts():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = only_line(baton("serve", "--port", str(port)))
    assert f"port {port}" in line
    assert "in use" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--set", "router.prot=1"), "'port'"),
        (("--set", "nonsense"), "table.key=value"),
        (("--port", "abc"), "router.port"),
        (("--config", "absent.toml"), "no such file"),
        (("--port", "0", "--set", "decode.tp=2", "--set", "decode.kv_sharding=true"), "[decode] kv_sharding"),
    ],
)
def test_serving_with_a_wrong_setting_is_one_line(arguments: tuple[str, ...], expected: str):
    assert expected in only_line(baton("serve", *arguments))


def test_the_environment_is_read_and_checked():
    assert "BATON_ROUTER_PROT" in only_line(baton("serve", BATON_ROUTER_PROT="1"))


def test_check_config_prints_what_is_in_force_and_reads_it_again(tmp_path: Path):
    path = tmp_path / "baton.toml"
    path.write_text('[router]\nport = 81\n[model]\nname = "a\\"b"\n')
    done = baton("check-config", str(path))
    assert done.returncode == 0
    assert "port = 81" in done.stdout
    assert re.search(r"^tp = 1 +# ranks that share a batch", done.stdout, re.MULTILINE)
    again = tmp_path / "again.toml"
    again.write_text(done.stdout)
    assert baton("check-config", str(again)).stdout == done.stdout


def test_check_config_shows_no_keys_and_what_it_prints_opens_nothing(tmp_path: Path):
    path = tmp_path / "baton.toml"
    path.write_text('[router]\napi_keys = ["sesame", "mellon"]\n')
    printed = baton("check-config", str(path)).stdout
    assert "# api_keys: 2 in force" in printed
    assert "sesame" not in printed
    assert "api_keys" not in tomllib.loads(printed)["router"]


def test_check_config_says_what_the_units_come_to():
    lines = baton("check-config", str(CONFIGS / "paper-32-320.toml")).stdout.splitlines()
    assert "# ranks a unit               32 = tp 4 x dp 8                       320 = tp 4 x dp 80" in lines
    assert "# In all 352 ranks, a GPU each, on 44 nodes." in lines


def test_check_config_of_sizes_that_do_not_fit_the_model_is_one_line(tmp_path: Path):
    path = tmp_path / "baton.toml"
    path.write_text("[decode]\ndp = 3\n")
    assert "[decode] redundant_experts = 0: " in only_line(baton("check-config", str(path)))


def test_check_config_of_a_wrong_file_is_one_line(tmp_path: Path):
    path = tmp_path / "baton.toml"
    path.write_text("[router]\nprot = 1\n")
    assert "'port'" in only_line(baton("check-config", str(path)))


def test_version_says_the_version():
    assert baton("--version").stdout == f"baton {version('baton-serving')}\n"


def test_no_command_and_unknown_benchmarks_say_what_there_is():
    assert "serve" in baton().stdout
    assert "engine" in only_line(baton("bench", "nonsense"))


@pytest.mark.parametrize("arguments", ["['--version']", "['chat', '--help']", "['check-config', 'absent']"])
def test_quick_commands_do_without_torch_and_ray(arguments: str):
    code = f"""
import sys
from serving.cli import main
try:
    main({arguments})
except SystemExit:
    pass
assert not {{'torch', 'ray'}} & set(sys.modules), set(sys.modules) & {{'torch', 'ray'}}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
