"""One router process, seen from the one that starts it: its command, its ready line, its death.

starting -> listening(url) -> dead        killing it harms nobody else; it ends with the process that started it
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from serving.cluster.process import child_command
from serving.core.config import Config, to_dict

_LISTENING = "router: listening on "


class RouterProcess:
    """Starts at once. `changed` is called from another thread whenever `url` or `exit_code` may have changed."""

    def __init__(
        self,
        *,
        router_id: str,
        config: Config,
        port: int,
        directory: str,
        model_dir: Path,
        secret: bytes,
        folder: Path,
        changed: Callable[[], None],
    ) -> None:
        """`folder` receives configuration and log. To be called from a thread that lives as long as the router may."""
        self.router_id = router_id
        self.url: str | None = None
        self.exit_code: int | None = None
        self._changed = changed
        self._log = folder / f"{router_id}.log"
        settings = folder / f"{router_id}.json"
        settings.write_text(json.dumps(to_dict(config)))
        command = child_command("router", end=signal.SIGKILL)
        command += ["--directory", directory, "--model-dir", str(model_dir), "--config", str(settings)]
        command += ["--port", str(port), "--router-id", router_id]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"BATON_SECRET": secret.hex()},
                start_new_session=True,  # Ctrl-C is for the parent, which drains
            )
        threading.Thread(target=self._watch, name=f"watch-{router_id}", daemon=True).start()

    @property
    def port(self) -> int:
        """The port it listens on; 0 before it does."""
        return int(self.url.rsplit(":", 1)[1]) if self.url else 0

    def last_words(self) -> str:
        """The last line it wrote, for whoever has to explain its death."""
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return lines[-1].removeprefix("router: ") if lines else ""

    def drain(self) -> None:
        """It takes no new connection, and ends when its streams have."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def wait(self, timeout_s: float) -> bool:
        """True: it has ended."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _watch(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_LISTENING):
                self.url = line.removeprefix(_LISTENING).strip()
                self._changed()
        self.exit_code = self._process.wait()
        self._changed()
