"""What can be known to be wrong before a single process is started: the model folder, the units and the ports.

Every fault is a BatonError of one line that says what to do.
"""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

from serving.cluster.placement import UnitPlan
from serving.core.config import Config, PrefillTable, unit_table
from serving.core.errors import ConfigError, ModelFolderError, StartupError
from serving.model.config import ModelConfig
from serving.model.units import UnitShape, check_drafts, shape_of

_PREFILL_KEYS_OF_BOTH = ("max_batched_tokens",)
"""Where one worker prefills and decodes."""


def embedded_model_dir() -> Path:
    """The folder of the model that is part of the distribution."""
    return Path(__file__).resolve().parent.parent / "demo" / "model"


def resolve_model_dir(config: Config) -> Path:
    """The folder that the configuration names, or the embedded model's. Raises ModelFolderError if there is none."""
    folder = Path(config.model.dir).expanduser().resolve() if config.model.dir else embedded_model_dir()
    if not folder.is_dir():
        raise ModelFolderError(
            f"{folder} is not a folder; give the folder of a Hugging Face checkpoint with --model DIR"
        )
    if not (folder / "config.json").is_file():
        raise ModelFolderError(
            f"{folder} holds no config.json; give the folder of a Hugging Face checkpoint with --model DIR"
        )
    return folder


def check_model_folder(folder: Path, config: Config) -> None:
    """Configuration, tokenizer, and the header of every weight file. Raises ModelFolderError. Reads no weights."""
    from serving.model.weights import check_weights
    from serving.text.tokenizer import Tokenizer

    check_weights(folder, ModelConfig.from_folder(folder))
    Tokenizer.from_folder(folder)


def check_units(config: Config, folder: Path, units: tuple[UnitPlan, ...], *, num_gpus: int) -> None:
    """Sizes that the model in `folder` does not fit (ConfigError), more ranks than GPUs here, sizes that are not served yet (StartupError)."""
    check_mode(config)
    model = ModelConfig.from_folder(folder)
    for role in dict.fromkeys(unit.role for unit in units):
        shape = check_role(config, role, model)
        if num_gpus and shape.chooses:
            check_replicas(config, role, shape, model)
    check_served(config)
    for name, dispatch in (("prefill", config.prefill.dispatch), ("decode", config.decode.dispatch)):
        if dispatch != "auto" and not num_gpus:
            raise ConfigError(
                f"[{name}] dispatch = {dispatch} is for GPUs, and the ranks compute on CPUs; set it to auto"
            )
    num_ranks, num_nodes = sum(len(unit.ranks) for unit in units), num_hosts(units)
    shared = all(len(unit.ranks) == 1 for unit in units)
    if num_gpus and not shared and (num_nodes > 1 or num_ranks > num_gpus):
        raise StartupError(
            f"{num_ranks} ranks with a GPU each, on {num_nodes} nodes at least, do not fit this machine of {num_gpus} GPUs; "
            "lower units, tp or dp, or set model.device to cpu"
        )


def check_role(config: Config, role: str, model: ModelConfig) -> UnitShape:
    """What the role's sizes come to. Raises ConfigError where they do not fit together or the model."""
    shape = shape_of(unit_table(config, role), model)
    _check_placement(config, role, shape, model)
    if role != "prefill":
        _check_drafts(config, shape, model)
    return shape


def _check_placement(config: Config, role: str, shape: UnitShape, model: ModelConfig) -> None:
    """Raises ConfigError where experts do not fit their nodes, or are to follow the load and cannot."""
    if shape.groups.ep == 1:
        return
    from serving.engine.placing import first_placement
    from serving.parallel.balance import check_choice

    name, table = "prefill" if role == "prefill" else "decode", unit_table(config, role)
    try:
        first_placement(shape, model)
    except ConfigError as error:
        raise ConfigError(
            f"[{name}] redundant_experts = {table.redundant_experts}: of the groups of experts that a node has, {error}; lower redundant_experts"
        ) from None
    try:
        if config.balance.period_s:
            check_choice(num_experts=shape.num_experts, num_slots=shape.num_slots, num_gpus=shape.groups.ep)
    except ConfigError as error:
        raise ConfigError(f"[{name}] {error}") from None


def _check_drafts(config: Config, shape: UnitShape, model: ModelConfig) -> None:
    wanted = config.decode.draft_tokens
    if wanted in ("auto", "0"):
        return
    check_drafts(wanted, alone=shape.groups.tp == shape.groups.ep == 1)
    if not (model.num_mtp_layers and config.model.mtp):
        raise ConfigError(
            f"[decode] draft_tokens = {wanted}: there is no MTP layer to draft with; set it to 0 or auto, or serve a model that has one with model.mtp = true"
        )


def check_replicas(config: Config, role: str, shape: UnitShape, model: ModelConfig) -> None:
    """Raises ConfigError for more than GPUs can choose replicas for. A step that we size ourselves is far below that."""
    from serving.kernels.redundancy import MOST_PICKS
    from serving.model.hosting import check_device

    groups = shape.groups
    name = "prefill" if role == "prefill" else "decode"
    try:
        check_device(groups.ep, shape.hosted_slots)
    except ConfigError as error:
        raise ConfigError(f"[{name}] {error}") from None
    # Of a token: its experts, and where that is routed, the shared one.
    most = MOST_PICKS // (groups.ep * (model.num_experts_per_token + shape.shared_expert_routed)) * groups.tp
    sizes = {
        "[prefill] max_batched_tokens": 0 if role == "decode" else config.prefill.max_batched_tokens,
        "[decode] max_num_seqs": 0 if role == "prefill" else config.decode.max_num_seqs,
    }
    for key, num_tokens in sizes.items():
        if num_tokens > most:
            raise ConfigError(
                f"{key} = {num_tokens} with [{name}] hosted_slots: on GPUs replicas are chosen for at most {most} tokens of each of these "
                f"dp groups at once; set it to {most} or less, or hosted_slots to 0"
            )


def check_mode(config: Config) -> None:
    """Raises ConfigError for what mode `both` would pass over in silence."""
    if config.engine.mode != "both":
        return
    for field in dataclasses.fields(PrefillTable):
        value = getattr(config.prefill, field.name)
        if field.name not in _PREFILL_KEYS_OF_BOTH and value != field.default:
            raise ConfigError(
                f"[prefill] {field.name} = {value} with [engine] mode = both, where units are as [decode] says; remove it, or set it there"
            )
    if config.kv.prefill_pages:
        raise ConfigError(
            f"[kv] prefill_pages = {config.kv.prefill_pages} with [engine] mode = both, where there is one pool; give decode_pages instead"
        )


def num_hosts(units: tuple[UnitPlan, ...]) -> int:
    """Nodes without which some unit has no place."""
    return max(unit.groups.num_nodes for unit in units)


def check_served(config: Config) -> None:
    """The one place that knows what the engine's ranks do not do as yet: such a key would otherwise be passed over in silence."""
    for name, table in (("prefill", config.prefill), ("decode", config.decode)):
        if table.kv_sharding:
            raise StartupError(
                f"[{name}] kv_sharding = true: in this build every TP rank holds every page; set kv_sharding to false"
            )


def router_ports(config: Config) -> list[int]:
    """Consecutive ports of the router processes; port 0 lets each take a free one."""
    first = config.router.port
    return [first + index if first else 0 for index in range(config.router.processes)]


def check_ports(config: Config) -> None:
    """Raises StartupError if a router could not listen on its port."""
    for port in router_ports(config):
        check_port(config.router.host, port)


def check_port(host: str, port: int) -> None:
    """Raises StartupError if `host`:`port` cannot be bound now."""
    if port > 65535:
        raise StartupError(f"port {port} does not exist; choose one up to 65535 with --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise StartupError(
            f"{host}:{port} is no address to listen on ({error}); give --host and --port of this machine"
        ) from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError:
            raise StartupError(f"port {port} needs privileges; choose one above 1023 with --port") from None
        except OSError as error:
            reason = "is in use" if error.errno == 98 else f"cannot be bound ({error.strerror})"
            raise StartupError(
                f"port {port} of {host} {reason}; stop what listens there, or choose another with --port"
            ) from None
