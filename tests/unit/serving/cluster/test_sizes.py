"""The table of `baton check-config`."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.cluster.sizes import describe_units
from serving.core.config import load_config
from serving.core.errors import ConfigError

CONFIGS = Path(__file__).parents[4] / "deploy" / "configs"


def described(file: str | None = None, *overrides: str) -> dict[str, list[str]]:
    """label -> cells; the sentences around the table under their first word."""
    lines = describe_units(load_config(None if file is None else CONFIGS / file, overrides=overrides))
    split = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    return {line[0] if len(line) > 1 else line[0].split()[0]: line[1:] or [line[0]] for line in split}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_file_fits(path: Path):
    lines = describe_units(load_config(path))
    assert any(line.startswith("In all ") for line in lines)
    assert max(map(len, lines)) <= 200


def test_the_papers_deployment():
    table = described("paper-32-320.toml")
    assert table["ranks a unit"] == ["32 = tp 4 x dp 8", "320 = tp 4 x dp 80"]
    assert table["nodes a unit"] == ["4, 8 ranks each", "40, 8 ranks each"]
    assert table["experts a layer"] == ["256 + 32 redundant", "256 + 64 redundant with the shared one"]
    assert table["experts a rank, in a step"] == ["9", "1"]
    assert table["weights a rank"] == ["30.4 GiB", "8.6 GiB"]
    assert table["In"] == ["In all 352 ranks, a GPU each, on 44 nodes."]


def test_the_production_deployment():
    table = described("production-ep144.toml")
    assert table["experts a rank, in a step"] == ["9", "2"]
    assert table["attention heads a rank"] == ["128", "128"]
    assert table["In"] == ["In all 176 ranks, a GPU each, on 22 nodes."]


def test_units_that_fill_a_part_of_a_node_share_it():
    assert described("node.toml")["In"] == ["In all 8 ranks, a GPU each, on 1 node."]
    assert described("node.toml", "decode.units=2")["In"] == ["In all 12 ranks, a GPU each, on 2 nodes."]


def test_a_model_that_is_not_here_is_said_to_be_taken_as_published(tmp_path: Path):
    assert "published sizes" in described(None, f"model.dir={tmp_path}/absent")["Units"][0]
    assert "embedded model" in described()["Units"][0]


def test_sharded_pages_make_room_for_more_tokens(tmp_path: Path):
    absent, sizes = f"model.dir={tmp_path}/absent", ("decode.tp=4", "decode.dp=8", "decode.ep=32")
    whole = described(None, absent, *sizes)["KV on an H200"][1]
    sharded = described(None, absent, *sizes, "decode.kv_sharding=true")["KV on an H200"][1]
    tokens = [int(cell.split(", ")[1].split()[0].replace(",", "")) for cell in (whole, sharded)]
    assert tokens[1] == 4 * tokens[0]


def test_weights_that_do_not_fit_a_gpu_say_by_how_much(tmp_path: Path):
    cells = described(None, f"model.dir={tmp_path}/absent")["KV on an H800"]
    assert all(cell.startswith("none: the weights need ") for cell in cells)


def test_what_is_not_served_yet_is_said_and_what_is_served_is_not():
    assert "Not" in described(None, "decode.tp=2", "decode.kv_sharding=true")
    assert "Not" not in described("node.toml")


def test_hosts_that_gpus_cannot_choose_among_are_said_not_to_be_served():
    hosting = "prefill.hosted_slots=16"
    assert "Not" not in described("paper-32-320.toml", hosting)
    assert "up to 32 ranks" in described("paper-32-320.toml", "decode.hosted_slots=2")["Not"][0]
    assert "at most 262140" in described("paper-32-320.toml", hosting, "prefill.max_batched_tokens=999999")["Not"][0]


def test_mode_both_has_one_column():
    assert described(None, "engine.mode=both", "decode.dp=2")["ranks a unit"] == ["2 = tp 1 x dp 2"]


def test_mode_both_is_told_of_keys_that_it_would_pass_over():
    with pytest.raises(ConfigError, match=r"^\[prefill\] tp = 2 with \[engine\] mode = both"):
        described("node.toml", "engine.mode=both", "decode.dp=8")


def test_what_does_not_fit_the_model_is_refused():
    with pytest.raises(ConfigError, match=r"^\[prefill\] tp = 16 does not divide the model's 8 attention heads"):
        described(None, "prefill.tp=16", "prefill.ranks_per_node=16")
