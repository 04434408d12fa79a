"""The worker of a TP rank that follows: no scheduler, no socket for jobs; it runs the steps of its leader until the unit ends.

    waiting for the bell <-> rounds and steps          ended: its leader has drained or stopped; RanksMissing: some rank has failed

Everything of a request passes its leader. It says nothing to routers, and its supervisor sees its process.
"""

from __future__ import annotations

import logging

from serving.core.spec import WorkerSpec
from serving.engine.build import Engine, build_engine_for
from serving.engine.unit import Follower
from serving.model.weights import Progress


class FollowerWorker:
    """Constructing loads the model and joins the unit; `run` returns when the unit has ended. `address`: nobody speaks to it."""

    address = None

    def __init__(self, spec: WorkerSpec, *, engine: Engine | None = None, progress: Progress | None = None) -> None:
        """`engine` is made from `spec` unless it is given. Raises ModelFolderError, ConfigError, StartupError, RanksMissing."""
        engine = engine or build_engine_for(spec, progress)
        assert engine.lockstep is not None, "a follower is one of several ranks"
        self._log = logging.getLogger(f"baton.{spec.worker_id}")
        self._follower = Follower(engine.runner, engine.lockstep, engine.copies)

    def run(self) -> None:
        """Raises RanksMissing."""
        try:
            self._follower.run()
        except BaseException:
            self._log.exception("the worker stops")
            raise
        finally:
            self._follower.close()

    def stop(self) -> None:
        """From any thread: the whole unit ends after a round."""
        self._follower.stop()
