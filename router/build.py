"""One router out of its parts: who tells whom, in one place. `Fleet` hears the workers, `Dispatcher` decides, `Api` answers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from starlette.types import ASGIApp

from router.account import Account
from router.admission import Admission
from router.app import Api, build_app
from router.auth import ApiKeys
from router.dispatch import Dispatcher
from router.fleet import Fleet
from router.generation import Generation
from router.openai.prepare import Served
from router.view import View
from serving.core.config import Config
from serving.metrics import Metrics
from serving.wire import Codec


@dataclass(frozen=True, kw_only=True)
class Router:
    """`app` starts and ends `fleet` with its lifespan."""

    app: ASGIApp
    dispatcher: Dispatcher
    fleet: Fleet
    view: View
    metrics: Metrics


def build_router(config: Config, served: Served, codec: Codec, *, directory: str) -> Router:
    """Belongs to the running event loop; nothing is started yet. `directory`: the supervisor's endpoint."""
    view, metrics = View(), Metrics("router", slo=config.slo)
    fleet = Fleet(view, codec, metrics, directory=directory, heartbeat_s=config.telemetry.heartbeat_s)
    dispatcher = Dispatcher(
        view,
        Admission[Generation](max_waiting=config.router.max_waiting, queue_timeout_s=config.router.queue_timeout_s),
        Account(metrics),
        post=fleet.post,
        later=asyncio.get_running_loop().call_later,
        clock=time.monotonic,
        expected_new_tokens=config.kv.expected_new_tokens,
    )
    api = Api(config, served, view, dispatcher, fleet, metrics)
    app = build_app(api, fleet, dispatcher, ApiKeys(config.router.api_keys))
    return Router(app=app, dispatcher=dispatcher, fleet=fleet, view=view, metrics=metrics)
