"""Order of the sources, and one line for everything that can be wrong."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from serving.core.config import Config, from_dict, load_config, to_dict
from serving.core.errors import ConfigError
from serving.core.spec import WorkerSpec

REPOSITORY = Path(__file__).parents[4]


def write(folder: Path, text: str) -> Path:
    path = folder / "baton.toml"
    path.write_text(text)
    return path


def message(path: Path | None = None, *overrides: str, environment: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, environment=environment, overrides=overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_no_source_gives_the_defaults():
    assert load_config() == Config()


def test_override_beats_environment_beats_file_beats_default(tmp_path: Path):
    path = write(tmp_path, "[router]\nport = 1\nprocesses = 2\nmax_waiting = 3\n[prefill]\nunits = 4\n")
    config = load_config(
        path,
        environment={"BATON_ROUTER_PORT": "10", "BATON_ROUTER_PROCESSES": "20"},
        overrides=["router.port=100"],
    )
    assert (config.router.port, config.router.processes, config.router.max_waiting) == (100, 20, 3)
    assert config.prefill.units == 4
    assert config.decode.units == Config().decode.units


def test_the_last_override_wins():
    assert load_config(overrides=["router.port=1", "router.port=2"]).router.port == 2


@pytest.mark.parametrize("text", ["true", "1", "yes", "on", "TRUE"])
def test_text_is_read_as_true(text: str):
    assert load_config(overrides=[f"model.mtp={text}"]).model.mtp is True


@pytest.mark.parametrize("text", ["false", "0", "no", "off"])
def test_text_is_read_as_false(text: str):
    assert load_config(overrides=[f"model.mtp={text}"]).model.mtp is False


def test_lists_come_from_toml_and_from_text(tmp_path: Path):
    path = write(tmp_path, '[router]\napi_keys = ["a", "b"]\n')
    assert load_config(path).router.api_keys == ("a", "b")
    assert load_config(path, overrides=["router.api_keys=c,d"]).router.api_keys == ("c", "d")


def test_a_whole_number_is_a_float_where_a_float_is_wanted(tmp_path: Path):
    config = load_config(write(tmp_path, "[slo]\nttft_ms = 500\n"))
    assert config.slo.ttft_ms == 500.0
    assert isinstance(config.slo.ttft_ms, float)


def test_a_value_may_hold_equal_signs():
    assert load_config(overrides=["model.name=a=b"]).model.name == "a=b"


def test_environment_of_others_is_left_alone():
    assert load_config(environment={"BATON_SECRET": "00", "HOME": "/", "BATONROUTER_PORT": "1"}) == Config()


def test_it_survives_the_way_to_another_process():
    config = load_config(overrides=["router.api_keys=a,b", "engine.mode=both", "kv.memory_fraction=0.5"])
    assert from_dict(to_dict(config)) == config
    assert from_dict(to_dict(config)) != Config()


def test_keys_and_secrets_are_shown_nowhere(tmp_path: Path):
    config = load_config(overrides=["router.api_keys=sesame"])
    spec = WorkerSpec(
        worker_id="w",
        role="both",
        incarnation=1,
        host="127.0.0.1",
        secret=b"sesame",
        model_dir=".",
        num_threads=1,
        config=config,
    )
    assert "sesame" not in repr(spec)
    assert "max_waiting" in repr(spec)
    assert "sesame" not in message(write(tmp_path, '[router]\napi_keys = ["sesame", 1]\n'))


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().router.port = 1  # type: ignore[misc]


def test_unknown_key_names_file_key_and_the_nearest(tmp_path: Path):
    path = write(tmp_path, "[router]\nprot = 1\n")
    text = message(path)
    assert str(path) in text
    assert "'prot'" in text
    assert "[router]" in text
    assert "'port'" in text


def test_unknown_table_names_file_table_and_the_nearest(tmp_path: Path):
    path = write(tmp_path, "[ruoter]\nport = 1\n")
    text = message(path)
    assert str(path) in text
    assert "[ruoter]" in text
    assert "'router'" in text


def test_unknown_key_in_environment_and_override_names_the_source():
    assert "BATON_ROUTER_PROT" in message(environment={"BATON_ROUTER_PROT": "1"})
    assert "--set router.prot=1" in message(None, "router.prot=1")


@pytest.mark.parametrize("text", ["router.port", "port=1", "=1", ""])
def test_an_override_of_another_shape_says_how_to_write_it(text: str):
    assert "table.key=value" in message(None, text)


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[router]\nport = '1'\n", "of type int"),
        ("[router]\nport = true\n", "of type int"),
        ("[router]\nport = 1.5\n", "of type int"),
        ("[model]\nmtp = 1\n", "of type bool"),
        ("[model]\nname = 1\n", "of type str"),
        ("[slo]\nttft_ms = 'x'\n", "of type float"),
        ("[router]\napi_keys = 'a'\n", "list of strings"),
        ("[router]\napi_keys = [1]\n", "list of strings"),
    ],
)
def test_a_wrong_type_names_the_right_one(tmp_path: Path, toml: str, expected: str):
    assert expected in message(write(tmp_path, toml))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("router.port=abc", "of type int"),
        ("slo.ttft_ms=abc", "of type float"),
        ("model.mtp=perhaps", "true or false"),
        ("router.port=-1", "at least 0"),
        ("prefill.units=0", "at least 1"),
        ("prefill.max_batched_tokens=63", "0 or at least 64"),
        ("decode.microbatches=3", "at most 2"),
        ("balance.period_s=0.5", "0 or at least 1"),
        ("balance.threshold=1.5", "at most 1"),
        ("engine.mode=neither", "disaggregated, both"),
        ("transfer.checksum=some", "sampled, all, off"),
        ("kernels.mla_decode=flash", "auto, baton, flashmla"),
        ("kernels.linear_fp8=flashmla", "auto, baton, deepgemm"),
    ],
)
def test_a_wrong_value_says_what_is_allowed(override: str, expected: str):
    assert expected in message(None, override)


def test_zero_leaves_the_tokens_of_a_step_to_the_device():
    assert load_config(overrides=["prefill.max_batched_tokens=0"]).prefill.max_batched_tokens == 0


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_float_must_be_a_number(number: str):
    assert "slo.ttft_ms" in message(None, f"slo.ttft_ms={number}")


def test_a_missing_file_says_what_to_pass(tmp_path: Path):
    assert "no such file" in message(tmp_path / "absent.toml")


@pytest.mark.parametrize("content", [b"[router", b"\xff\xfe", b"port = 1\n"])
def test_a_file_that_is_not_such_a_toml_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "baton.toml"
    path.write_bytes(content)
    assert str(path) in message(path)


def test_every_key_has_a_help_text():
    for table in dataclasses.fields(Config):
        for key in dataclasses.fields(table.default):
            assert key.metadata["help"], f"{table.name}.{key.name}"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "deploy" / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_file_loads_and_says_something(path: Path):
    load_config(path)
    assert tomllib.loads(path.read_text())
