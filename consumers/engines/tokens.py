"""When an engine that only counts its tokens has made the first one: its counter is looked at until
it rises.

Does no I/O of its own. It is looked at gently: often at first, seldom when nothing runs, never for
more than a small share of the time that the engine has, and no more once it does not answer. What
is made before the counter is first read, some milliseconds after the engine serves again, is told
from what comes next only by the resolution.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Final

import anyio

from weightbus.consumers.engines.budget import left_s
from weightbus.consumers.engines.engine import TokenSeen
from weightbus.consumers.errors import ConsumerError

__all__ = ("FIRST_POLL_S", "LONGEST_POLL_S", "MOST_OF_ENGINE", "TokenCount", "first_rise", "total")

FIRST_POLL_S: Final = 0.02
"""Between the first two looks; each pause is longer than the one before by `_GROWTH`."""

LONGEST_POLL_S: Final = 0.5

MOST_OF_ENGINE: Final = 0.1
"""Of the time may be spent with waiting for its answers, unless `LONGEST_POLL_S` is over."""

_GROWTH: Final = 1.3

_ANSWER_S: Final = 1.0
"""An engine that takes longer is not asked again."""

_SAMPLE: Final = re.compile(
    r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{.*\})?[ \t]+(\S+)(?:[ \t]+-?\d+)?[ \t]*$", re.MULTILINE
)
"""A line of Prometheus' text format: name, labels, value, and perhaps a time."""

TokenCount = Callable[[float], Awaitable[float | None]]
"""Asks within so many seconds for a number that rises with every token; None: it is not told."""

_logger = logging.getLogger(__name__)


async def first_rise(
    count: TokenCount, is_over: Callable[[], bool], deadline_s: float
) -> TokenSeen | None:
    """When a count first rose, from now on; None: it has not within `deadline_s`, it is not told,
    or the engine does not answer.

    Args:
        is_over: whether it need not be looked at any more.
    """
    end = anyio.current_time() + deadline_s
    since_ns = time.monotonic_ns()  # durations are not taken from a clock that may be set
    known: float | None = None
    pause_s = FIRST_POLL_S
    while left_s(end) > 0:
        asked_ns, asked_s = time.monotonic_ns(), anyio.current_time()
        try:
            found = await count(min(_ANSWER_S, left_s(end)))
        except ConsumerError as error:
            _logger.debug("tokens are not counted: %s", error)
            return None
        now_ns, at_ns = time.monotonic_ns(), time.time_ns()
        if found is None or is_over():
            return None
        if known is not None:
            if found != known:  # less: it was started anew
                rose = found > known
                return TokenSeen(at_ns=at_ns, resolution_ns=now_ns - since_ns) if rose else None
            since_ns = asked_ns
        known = found
        took_s = anyio.current_time() - asked_s
        longest_s = min(LONGEST_POLL_S, left_s(end))
        await anyio.sleep(min(max(pause_s, took_s / MOST_OF_ENGINE), longest_s))
        pause_s = min(_GROWTH * pause_s, LONGEST_POLL_S)
        if is_over():
            return None
    return None


def total(text: str, names: Collection[str]) -> float | None:
    """The sum of all samples of these names in Prometheus' text format; None: there are none."""
    values = []
    for name, value in _SAMPLE.findall(text):
        if name in names:
            try:
                number = float(value)
            except ValueError:
                continue
            if math.isfinite(number):
                values.append(number)
    return sum(values) if values else None
