"""The counters of an engine on this host, as it shows them to Prometheus over HTTP.

Owns what is known of the endpoint: whether it can be asked for some counters alone, as Prometheus'
client for Python lets it: then nothing else is put together there. vLLM and SGLang mount that at
`/metrics/`; at `/metrics` vLLM shows everything, whatever it is asked for.
"""

from __future__ import annotations

import anyio

from weightbus.consumers.engines.budget import left_s
from weightbus.consumers.engines.http import HttpRefused, JsonServer
from weightbus.consumers.engines.tokens import total

__all__ = ("HttpCounter",)

_CHOSEN, _WHOLE = "/metrics/", "/metrics"
_REQUEST_TIMEOUT, _TOO_MANY, _SERVER_ERRORS = 408, 429, 500
"""Answers, and those from the last of them on, of a server that may do so a moment later."""


class HttpCounter:
    """Counters of one server, whose sum is asked for.

    Args:
        names: of the counters; all metrics of such an engine begin as the first of them does, up to
            its colon.
        key: of the API, sent as a bearer token; empty: none.
    """

    def __init__(self, server: JsonServer, names: tuple[str, ...], key: str = "") -> None:
        self._server, self._names, self._key = server, names, key
        self._prefix = names[0].partition(":")[0] + ":"
        self._is_chosen = True

    async def read(self, deadline_s: float) -> float | None:
        """The sum of them all, 0 if nothing was counted yet; None: it shows no metrics of its own.

        Raises:
            EngineUnavailable: it did not answer, or refused: it was started without metrics.
            DeadlineExceeded
        """
        end = anyio.current_time() + deadline_s
        if self._is_chosen:
            query = {"name[]": list(self._names)}
            try:
                text = await self._server.text(_CHOSEN, deadline_s, query=query, key=self._key)
            except HttpRefused as error:
                self._is_chosen = _is_passing(error.status)
            else:
                if (found := total(text, self._names)) is not None:
                    return found
                self._is_chosen = False  # where several processes count, it shows all or nothing
        text = await self._server.text(_WHOLE, left_s(end), key=self._key)
        if (found := total(text, self._names)) is not None:
            return found
        return 0.0 if f"\n{self._prefix}" in text else None


def _is_passing(status: int) -> bool:
    return status in (_REQUEST_TIMEOUT, _TOO_MANY) or status >= _SERVER_ERRORS
