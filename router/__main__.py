"""`python -m router`: one router process, from its settings to its exit code.

settings and model folder -> bind the port -> serve -> SIGTERM: drain -> exit 0      any BatonError: one line, its exit code
                                                       SIGTERM again: every client is told -> exit 0
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

import uvicorn

from router.build import build_router
from router.openai.prepare import Served
from router.settings import Settings, read_settings
from serving.core.collector import pass_over_what_is_loaded
from serving.core.config import ModelTable
from serving.core.errors import BatonError, StartupError, Unavailable
from serving.model.config import ModelConfig
from serving.text.template import ChatTemplate, Style, detect_style
from serving.text.tokenizer import Tokenizer
from serving.wire import Codec

_BACKLOG = 2048
_LAST_WORDS_S = 0.5


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn would raise them again after the drain, and the exit code would not be 0.

    So is the wait for them: uvicorn looks ten times a second whether it should end, and makes the Date header, which
    `router.middleware` does when there is an answer to date.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """No new connection; returns at once."""
        self.should_exit = True
        self._stopped.set()

    async def main_loop(self) -> None:
        await self._stopped.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: Settings, served: Served, listener: socket.socket) -> None:
    """Until SIGTERM or SIGINT; then streams in flight run to their end, or until a second signal ends each with an error."""
    loop = asyncio.get_running_loop()
    incarnation = time.time_ns()  # rises with every start of the same router id
    codec = Codec(settings.secret, settings.router_id, incarnation)
    router = build_router(settings.config, served, codec, directory=settings.directory)
    server = _Server(
        uvicorn.Config(
            router.app,
            http="httptools",
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            timeout_keep_alive=75,
        )
    )

    def stop() -> None:
        """The first signal lets streams end. The second tells them that they do not, and leaves them a moment to be written."""
        if router.dispatcher.draining:
            router.dispatcher.end_all(Unavailable("the server stops; send the request again later"))
            loop.call_later(_LAST_WORDS_S, setattr, server, "force_exit", True)
        router.dispatcher.draining = True
        server.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    announcement = loop.create_task(_announce(server, url))
    await server.serve(sockets=[listener])
    announcement.cancel()


async def _announce(server: _Server, url: str) -> None:
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    pass_over_what_is_loaded()
    print(f"router: listening on {url}", flush=True)


def load_served(model_dir: str, table: ModelTable) -> Served:
    """Tokenizer, chat format and limits of a model folder. Raises ModelFolderError."""
    model = ModelConfig.from_folder(model_dir)
    tokenizer = Tokenizer.from_folder(model_dir)
    style: Style = detect_style(model_dir) if table.chat_format == "auto" else _style(table.chat_format)
    return Served(
        name=table.name or os.path.basename(os.path.abspath(model_dir)),
        tokenizer=tokenizer,
        template=ChatTemplate(tokenizer, style),
        eos_ids=tuple(dict.fromkeys((*tokenizer.eos_ids, *model.eos_token_ids))),
        vocab_size=min(model.vocab_size, tokenizer.vocab_size),
        max_positions=model.max_position_embeddings,
    )


def _style(name: str) -> Style:
    styles: dict[str, Style] = {"v3": "v3", "r1": "r1", "v3.1": "v3.1"}
    return styles[name]


def bind(host: str, port: int) -> socket.socket:
    """A listening-to-be socket. Raises StartupError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise StartupError(
                f"port {port} on {host} is in use; stop who has it, or choose another with --port"
            ) from None
        raise StartupError(f"cannot listen on {host} port {port}: {error}; check router.host and router.port") from None
    return listener


def main(arguments: Sequence[str], environment: Mapping[str, str], stdin: TextIO) -> int:
    try:
        settings = read_settings(arguments, environment, stdin)
        logging.basicConfig(
            level=settings.config.telemetry.log_level.upper(), format="%(asctime)s router %(levelname)s %(message)s"
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        served = load_served(settings.model_dir, settings.config.model)
        listener = bind(settings.host, settings.port)
    except BatonError as error:
        print(f"router: {error}", file=sys.stderr)
        return error.exit_code
    with listener, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(serve(settings, served, listener))
    return 0


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # it does not exist on every system
        return None
    return uvloop.Loop


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ, sys.stdin))
