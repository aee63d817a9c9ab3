"""Keeps OpenTelemetry's exporters quiet while they export for us.

They log every batch that fails and every try, for as long as a collector is away: a training run's
log would hold little else. What is lost is counted, and told once, at the end.
Owns a filter of these exporters' loggers, which drops what is logged by an export of ours, in its
thread, and nothing else: a trainer may have exporters of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ("Said", "hushed")

LOGGERS: Final = ("opentelemetry.exporter.", "grpc.", "urllib3.")


class Said:
    """What an export would have logged."""

    last: str = ""


class _Filter(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.here = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        said: Said | None = getattr(self.here, "said", None)
        if said is None:
            return True
        if record.levelno >= logging.WARNING:
            said.last = record.getMessage()
        return False


_FILTER: Final = _Filter()


@contextmanager
def hushed() -> Iterator[Said]:
    """Around one export in this thread: exporters log nothing, and what they would have is here."""
    for name in tuple(logging.root.manager.loggerDict):
        if name.startswith(LOGGERS):
            logging.getLogger(name).addFilter(_FILTER)  # the same once only
    said = _FILTER.here.said = Said()
    try:
        yield said
    finally:
        _FILTER.here.said = None
