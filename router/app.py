"""The HTTP API of one router: routes, and the objects behind them put together.

Must not know sockets: the fleet is handed in. `build_app` returns a plain ASGI application.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp

from router.auth import ApiKeys
from router.body import read_body
from router.dispatch import Dispatcher
from router.fleet import Fleet
from router.generation import Generation, Order, Slo
from router.middleware import Authentication, RequestIds
from router.openai import chunks, prepare
from router.openai.answer import Answer, StreamedAnswer, WholeAnswer
from router.openai.choice import Choice, Reader, TextReader, chat_reader
from router.openai.errors import error_response, on_baton_error, on_http_exception
from router.openai.prepare import Prepared, Served
from router.openai.schemas import BodyDecoder, ChatBody, CompletionBody, Sampling
from router.policy import capacity_tokens, missing_role
from router.view import View
from serving.core.config import Config
from serving.core.errors import BatonError, ModelNotFound, RequestError
from serving.metrics import Metrics, merge

_LONG_BODY_BYTES = 16 * 1024
"""From here on, tokenising takes long enough (about 5 ms) to go to a thread."""

Submit = Callable[[Callable[[], None]], list[Choice]]
MakeReader = Callable[[Served, Prepared], Reader]


class Api:
    """The routes. One instance a process."""

    def __init__(
        self, config: Config, served: Served, view: View, dispatcher: Dispatcher, fleet: Fleet, metrics: Metrics
    ) -> None:
        self._config = config
        self._served = served
        self._view = view
        self._dispatcher = dispatcher
        self._fleet = fleet
        self._metrics = metrics
        self._chat_body = BodyDecoder(ChatBody)
        self._completion_body = BodyDecoder(CompletionBody)
        self._created = int(time.time())

    # -- generation -----------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        data = await read_body(request, self._config.router.max_body_bytes)

        def ready() -> tuple[ChatBody, list[Prepared]]:
            body: ChatBody = self._chat_body(data)
            return body, [prepare.chat(body, self._served, self._max_model_len())]

        body, prompts = await self._prepared(data, ready)
        names = ("chatcmpl", "chat.completion.chunk" if body.stream else "chat.completion")
        return self._answer(request, body, prompts, names, chat_reader)

    async def completions(self, request: Request) -> Response:
        data = await read_body(request, self._config.router.max_body_bytes)

        def ready() -> tuple[CompletionBody, list[Prepared]]:
            body: CompletionBody = self._completion_body(data)
            return body, prepare.completions(body, self._served, self._max_model_len())

        body, prompts = await self._prepared(data, ready)
        return self._answer(request, body, prompts, ("cmpl", "text_completion"), TextReader)

    async def _prepared(self, data: bytes, ready: Callable[[], Any]) -> Any:
        try:
            return ready() if len(data) < _LONG_BODY_BYTES else await asyncio.to_thread(ready)
        except RequestError:
            self._metrics.add("baton_requests_rejected_total", reason="invalid")
            raise

    def _answer(
        self,
        request: Request,
        body: Sampling,
        prompts: list[Prepared],
        names: tuple[str, str],
        make_reader: MakeReader,
    ) -> Answer:
        head = chunks.head(request.scope["baton.request_id"], names[0], names[1], self._served.name)
        start = self._submit(prompts, body.n or 1, self._slo(request), make_reader)
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        writer_type = chunks.ChatChunks if isinstance(body, ChatBody) else chunks.CompletionChunks
        writer = writer_type(head, self._served.tokenizer, include_usage=include_usage)
        return (StreamedAnswer if body.stream else WholeAnswer)(self._dispatcher, start, writer)

    def _submit(self, prompts: list[Prepared], num_choices: int, slo: Slo, make_reader: MakeReader) -> Submit:
        """All choices or none: if one is refused, those before it are cancelled."""

        def submit(notify: Callable[[], None]) -> list[Choice]:
            choices: list[Choice] = []
            try:
                for prepared in prompts:
                    for n in range(num_choices):
                        generation = self._generation(prepared, n, slo, notify)
                        reader = make_reader(self._served, prepared)
                        choices.append(Choice(len(choices), prepared, generation, reader, self._dispatcher.stop))
            except BatonError:
                for choice in choices:
                    self._dispatcher.cancel(choice.generation)
                raise
            return choices

        return submit

    def _generation(self, prepared: Prepared, n: int, slo: Slo, notify: Callable[[], None]) -> Generation:
        order = Order(
            prompt_ids=prepared.prompt_ids,
            sampling=prepared.sampling_of(n),
            max_new_tokens=prepared.max_new_tokens,
            slo=slo,
        )
        return self._dispatcher.submit(order, notify)

    def _max_model_len(self) -> int:
        """Configured, of the model, or what the largest pools hold: the smallest of those that are known."""
        limits = (self._config.model.max_model_len, self._served.max_positions, capacity_tokens(self._view))
        return min(limit for limit in limits if limit)

    def _slo(self, request: Request) -> Slo:
        slo = self._config.slo
        return Slo(
            ttft_s=_milliseconds(request, "x-slo-ttft-ms", slo.ttft_ms) / 1000.0,
            tpot_s=_milliseconds(request, "x-slo-tpot-ms", slo.tpot_ms) / 1000.0,
        )

    # -- models, probes, metrics ----------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._served.name:
            raise ModelNotFound(f"the model {name!r} does not exist here", param="model", code="model_not_found")
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "baton",
            "max_model_len": self._max_model_len(),
        }

    async def livez(self, request: Request) -> Response:
        return _json({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        role = missing_role(self._view)
        if role is None and not self._dispatcher.draining:
            return _json({"status": "ready"})
        return _json({"status": "draining" if role is None else f"no {role} worker is ready"}, 503)

    async def health(self, request: Request) -> Response:
        """Whether the engines move: 503 while a worker is silent or stuck in a step, or a role has no worker."""
        now_s = time.monotonic()
        workers = {
            worker.worker_id: {
                "role": worker.role,
                "state": worker.roster_state,
                "ready": worker.usable,
                "silent": worker.silent,
                "stuck": worker.stuck(now_s),
                "progress": worker.progress,
                "credit_pages": worker.credit_pages,
            }
            for worker in self._view
        }
        well = missing_role(self._view) is None and not any(w["silent"] or w["stuck"] for w in workers.values())
        load = {"running": self._dispatcher.num_running, "waiting": self._dispatcher.num_waiting}
        return _json({"status": "ok" if well else "degraded", **load, "workers": workers}, 200 if well else 503)

    async def metrics(self, request: Request) -> Response:
        texts = await self._fleet.scrape()
        self._metrics.set("baton_requests_running", self._dispatcher.num_running, role="router")
        self._metrics.set("baton_requests_waiting", self._dispatcher.num_waiting, role="router")
        return Response(merge([self._metrics.exposition(), *texts]), media_type="text/plain; version=0.0.4")


def build_app(api: Api, fleet: Fleet, dispatcher: Dispatcher, keys: ApiKeys) -> ASGIApp:
    """`fleet` is started with the event loop and closed with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        fleet.start(dispatcher)
        yield
        fleet.close()

    app = FastAPI(openapi_url=None, lifespan=lifespan)
    for path, handler in (("/v1/chat/completions", api.chat), ("/v1/completions", api.completions)):
        app.add_api_route(path, handler, methods=["POST"], response_model=None)
    for path, handler in (
        ("/v1/models", api.models),
        ("/v1/models/{name:path}", api.model),
        ("/livez", api.livez),
        ("/readyz", api.readyz),
        ("/health", api.health),
        ("/metrics", api.metrics),
    ):
        app.add_api_route(path, handler, methods=["GET"], response_model=None)
    app.add_exception_handler(BatonError, on_baton_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, on_baton_error)
    return RequestIds(Authentication(app, keys))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    return error_response(RequestError(f"the request is not valid: {error}"))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody will read it."""
    return Response(status_code=400)


def _milliseconds(request: Request, name: str, default: float) -> float:
    text = request.headers.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < float("inf"):
        raise RequestError(f"header {name}: {text!r} is no number of milliseconds", param=name, code="invalid_value")
    return value


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
