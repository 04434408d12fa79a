"""The worker of a TP rank that follows: no scheduler, no socket for jobs; it runs the steps of its leader until the unit ends.

    waiting for the bell <-> rounds and steps          ended: its leader has drained or stopped; RanksMissing: some rank has failed

Everything of a request passes its leader; its pages of it, it sends, receives and copies itself (`kvcache.transfer.follower`). It says
nothing to routers, and its supervisor sees its process.
"""

from __future__ import annotations

import logging

import msgspec

from kvcache.transfer.base import PageSource, PageTarget
from kvcache.transfer.follower import PageFollower
from kvcache.transfer.nixl import NixlSource, NixlTarget
from serving.core.messages import PeerAddress
from serving.core.spec import WorkerSpec
from serving.engine.build import Engine, build_engine_for
from serving.engine.unit import Follower
from serving.model.weights import Progress


class FollowerWorker:
    """Constructing loads the model and joins the unit; `run` returns when the unit has ended. `address`: nobody speaks to it."""

    address = None

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        engine: Engine | None = None,
        source: PageSource | None = None,
        target: PageTarget | None = None,
        progress: Progress | None = None,
    ) -> None:
        """`engine`, `source` and, of a decode unit, `target` are made from `spec` unless they are given.

        Raises ModelFolderError, ConfigError, StartupError, RanksMissing.
        """
        engine = engine or build_engine_for(spec, progress)
        assert engine.lockstep is not None, "a follower is one of several ranks"
        self._log = logging.getLogger(f"baton.{spec.worker_id}")
        self._pages: PageFollower | None = None
        run_ahead = spec.config.engine.run_ahead and engine.pool.tensor.is_cuda
        if spec.role == "both":
            self._follower = Follower(engine.runner, engine.lockstep, run_ahead=run_ahead)
            return
        name = f"{spec.worker_id}.{spec.incarnation}"
        source = source or NixlSource(f"{name}.source", engine.pool)
        if spec.role == "decode":
            target = target or NixlTarget(f"{name}.target", engine.pool)
        leader = msgspec.msgpack.decode(engine.lockstep.announce(None), type=PeerAddress)
        self._pages = PageFollower(
            spec,
            leader,
            tp_rank=engine.lockstep.tp_rank,
            pool=engine.pool,
            source=source,
            target=target,
            failed=self.stop,
        )
        self._follower = Follower(engine.runner, engine.lockstep, self._pages.computed, run_ahead=run_ahead)

    def run(self) -> None:
        """Raises RanksMissing."""
        try:
            if self._pages is not None:
                self._pages.start()
            self._follower.run()
        except BaseException:
            self._log.exception("the worker stops")
            raise
        finally:
            self._follower.close()
            if self._pages is not None:
                self._pages.close()

    def stop(self) -> None:
        """From any thread: the whole unit ends after a round."""
        self._follower.stop()
