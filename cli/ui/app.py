"""The page's server: its files, its state as events, waterfalls, and exports of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Final

import anyio.to_thread
import msgspec
from msgspec import structs
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from weightbus.bus.errors import BusError
from weightbus.cli.ui.feed import Feed
from weightbus.cli.ui.guard import Guard
from weightbus.cli.ui.stream import EventStreams
from weightbus.schemas.catalogue import check_token
from weightbus.schemas.errors import MessageInvalid
from weightbus.tracing.exports.formats import FORMATS, Format
from weightbus.tracing.exports.html import SCRIPTS
from weightbus.tracing.waterfall import Waterfall

__all__ = ("EXPORTS", "build_app")

FILES: Final = {
    "/": ("weightbus.cli.ui", "index.html", "text/html"),
    "/ui.css": ("weightbus.cli.ui", "ui.css", "text/css"),
    "/ui.js": ("weightbus.cli.ui", "ui.js", "text/javascript"),
    "/icon.svg": ("weightbus.cli.ui", "icon.svg", "image/svg+xml"),
    "/waterfall.css": ("weightbus.tracing.exports", "waterfall.css", "text/css"),
    **{f"/{name}": ("weightbus.tracing.exports", name, "text/javascript") for name in SCRIPTS},
}
"""Path -> package, file of its folder `static`, media type."""


def _json(waterfall: Waterfall) -> str:
    return msgspec.json.encode(waterfall).decode()


EXPORTS: Final = FORMATS | {"json": Format(_json, ".json")}
"""What a waterfall can be saved as."""


def build_app(feed: Feed, streams: EventStreams, host: str) -> ASGIApp:
    """The application that serves what `feed` knows, to whoever asks for it at `host`."""

    async def waterfall(request: Request) -> Response:
        found = await _find(feed, request)
        if isinstance(found, Response):
            return found
        if feed.board.is_running(found.model, found.round):
            found = _without_buckets(found)
        return _answer(msgspec.json.encode(found), "application/json")

    async def export(request: Request) -> Response:
        kind = request.path_params["kind"]
        if kind not in EXPORTS:
            return PlainTextResponse(f"exports are {', '.join(EXPORTS)}\n", 404)
        found = await _find(feed, request)
        if isinstance(found, Response):
            return found
        made = await anyio.to_thread.run_sync(EXPORTS[kind].make, found)
        response = _answer(made, "text/html" if kind == "html" else "application/json")
        name = f"weightbus-{found.model}-{found.round}{EXPORTS[kind].suffix}"
        response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
        return response

    routes = [Route(path, _file(*file)) for path, file in FILES.items()]
    routes += [
        Route("/api/events", streams),
        Route("/api/rounds/{model}/{round}", waterfall),
        Route("/api/rounds/{model}/{round}/{kind}", export),
    ]
    return Guard(Starlette(routes=routes), host)


def _without_buckets(waterfall: Waterfall) -> Waterfall:
    """What a page is told again and again while the round runs: buckets are most of its size."""
    return structs.replace(
        waterfall,
        engines=tuple(
            structs.replace(
                engine,
                stages=tuple(structs.replace(stage, buckets=()) for stage in engine.stages),
            )
            for engine in waterfall.engines
        ),
    )


def _file(package: str, name: str, media_type: str) -> Callable[[Request], Response]:
    content = files(package).joinpath("static", name).read_bytes()

    def answer(request: Request) -> Response:
        return _answer(content, media_type)

    return answer


async def _find(feed: Feed, request: Request) -> Waterfall | Response:
    """The waterfall of the round that a path names, or why there is none."""
    model, round_id = request.path_params["model"], request.path_params["round"]
    try:
        check_token("model", model)
        check_token("round", round_id)
        found = await feed.waterfall(model, round_id)
    except MessageInvalid as error:
        return PlainTextResponse(f"{error}\n", 400)
    except BusError as error:
        return PlainTextResponse(f"{error}\n", 503)
    return found or PlainTextResponse(f"round {round_id} of {model} is not remembered\n", 404)


def _answer(content: str | bytes, media_type: str) -> Response:
    headers = {"Cache-Control": "no-store"}
    return Response(content, media_type=media_type, headers=headers)
