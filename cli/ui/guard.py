"""What stands before every answer of the page: who may ask, and what a browser may do with it.

Pure ASGI; does no I/O of its own. The page shows what any monitor may see and changes nothing, but
a web site that is open in the same browser is no monitor: it could reach a server on loopback
under a name of its own that it lets point there (DNS rebinding). So a request must name the host
by an address, as `localhost`, or as the page was told to be called; and only GET and HEAD exist.
"""

from __future__ import annotations

import ipaddress
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ("HEADERS", "Guard", "is_allowed_host")

HEADERS: Final = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""On every answer. No text can become markup or script: trusted types forbid the ways to it."""

METHODS: Final = ("GET", "HEAD")


class Guard:
    """Answers what may not be asked itself, and adds `HEADERS`."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        app = self._refusal(scope) or self._app

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await app(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not is_allowed_host(hosts[0], self._host):
            return PlainTextResponse("weightbus ui: ask for it by its address\n", 421)
        if scope["method"] not in METHODS:
            allow = {"Allow": ", ".join(METHODS)}
            return PlainTextResponse("weightbus ui: it only shows\n", 405, headers=allow)
        return None


def is_allowed_host(header: str, own: str) -> bool:
    """Whether a Host header names this server: by `own`, as `localhost`, or by any address.

    The port is no matter: a tunnel may end at another one.
    """
    name = header.rpartition(":")[0] if header.rpartition(":")[2].isdecimal() else header
    if name.lower() in ("localhost", own.lower()):
        return True
    bare = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    try:
        ipaddress.ip_address(bare)
    except ValueError:
        return False
    return True
