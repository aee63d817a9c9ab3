"""The words for telemetry that was lost: how much, where it was sent to, and why. Does no I/O."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

__all__ = ("cause_told", "lost_told")

NO_ANSWER: Final = (
    "Connection refused",
    "Name or service not known",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "No route to host",
    "timed out",
)
"""What exporters wrap into representations of Python's objects, several deep."""


def lost_told(count: int, one: str, several: str, service: str) -> str:
    """`2 spans of trainer were lost`."""
    return f"{count} {one if count == 1 else several} of {service} {_were(count)} lost"


def cause_told(endpoint: str, said: str) -> str:
    """Why, by what an exporter has said, if anything; names the endpoint, if it is known, without
    credentials."""
    parts = urlsplit(endpoint)
    where = (
        parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl() or "an exporter"
    )
    for reason in NO_ANSWER:
        if reason in said:
            return f"nobody answered at {where}: {reason}"
    return f"{where}: {said}" if said else f"sent to {where}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
