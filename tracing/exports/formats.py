"""The formats in which a waterfall leaves this program, by name. Does no I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec import Struct

from weightbus.tracing.exports.html import html_report
from weightbus.tracing.exports.otlp_json import otlp_json
from weightbus.tracing.exports.perfetto import perfetto
from weightbus.tracing.waterfall import Waterfall

__all__ = ("FORMATS", "Format")


class Format(Struct, frozen=True):
    """One format, a text."""

    make: Callable[[Waterfall], str]
    suffix: str
    """Of a file's name."""


FORMATS: Final = {
    "perfetto": Format(perfetto, ".perfetto.json"),
    "otlp-json": Format(otlp_json, ".otlp.json"),
    "html": Format(html_report, ".html"),
}
