"""The demo's last round as files to look at: a report, and traces for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from weightbus.tracing.exports.formats import FORMATS
from weightbus.tracing.waterfall import Waterfall

__all__ = ("make_directory", "write_report")

NAME: Final = "round"
"""Of the files, without what tells their format."""


def make_directory(directory: Path) -> None:
    """Before the demo begins: it is not to fail at its end.

    Raises:
        FileError: it cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.FileError(str(directory), error.strerror) from None


def write_report(directory: Path, waterfall: Waterfall) -> str:
    """One file in each format; returns what to tell of them.

    Raises:
        FileError: one cannot be written.
    """
    paths = {name: directory / f"{NAME}{kind.suffix}" for name, kind in FORMATS.items()}
    for name, path in paths.items():
        try:
            path.write_text(FORMATS[name].make(waterfall), encoding="utf-8")
        except OSError as error:
            raise click.FileError(str(path), error.strerror) from None
    return (
        f"round {waterfall.round}: open {paths['html']} in a browser, {paths['perfetto']} in "
        f"https://ui.perfetto.dev; {paths['otlp-json']} is for OTLP collectors"
    )
