"""The results of a run: their form in JSON, and the table on the terminal.

Owns the output file: it is written anew after every part, so that a run that is killed keeps what
it has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

__all__ = ("Report", "Run", "print_table", "read_report", "run_of", "write_report")

SHOWN_PARTS: Final = ("event_to_plan_s", "pause_s", "transfer_s", "resume_s", "publish_s")


class Run(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that was measured, over all repetitions."""

    name: str
    median_s: float | None
    """None: it was not measured, and `note` says why."""
    min_s: float | None
    max_s: float | None
    gb: float
    """10^9 bytes: of the checkpoint that was brought; of the link, what went over it."""
    extra_gpu_bytes: int | None
    """The most that one GPU had in use over what it had with the engine at rest; None: no GPU."""
    parts: dict[str, float]
    """Medians, in seconds."""
    repetitions: tuple[float, ...] = ()
    """Seconds of each."""
    note: str = ""


class Report(Struct, frozen=True, kw_only=True):
    machine: dict[str, Any]
    versions: dict[str, str]
    command: str
    checkpoint: dict[str, Any]
    runs: tuple[Run, ...]


def run_of(
    name: str,
    seconds: Sequence[float],
    size_bytes: int,
    parts: Mapping[str, Sequence[float]],
    *,
    extra_gpu_bytes: int | None = None,
    note: str = "",
) -> Run:
    """
    Args:
        parts: of each repetition, or of one that is like all.
    """
    return Run(
        name=name,
        median_s=_rounded(median(seconds)) if seconds else None,
        min_s=_rounded(min(seconds)) if seconds else None,
        max_s=_rounded(max(seconds)) if seconds else None,
        gb=round(size_bytes / 1e9, 4),
        extra_gpu_bytes=extra_gpu_bytes,
        parts={part: _rounded(median(each)) for part, each in parts.items() if each},
        repetitions=tuple(map(_rounded, seconds)),
        note=note,
    )


def _rounded(seconds: float) -> float:
    return round(seconds, 6)


def write_report(report: Report, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    os.replace(unfinished, path)


def read_report(path: Path) -> Report:
    """
    Raises:
        msgspec.ValidationError: it is not the report of a run.
    """
    return msgspec.json.decode(path.read_bytes(), type=Report)


def print_table(runs: Sequence[Run]) -> None:
    """With every run's rate and, of ours, the parts that are asked for most."""
    table = Table("run", "median s", "min", "max", "GB", "GB/s", "extra MiB", *SHOWN_PARTS)
    for run in runs:
        extra = "" if run.extra_gpu_bytes is None else f"{run.extra_gpu_bytes / 2**20:.0f}"
        rate = f"{run.gb / run.median_s:.1f}" if run.median_s else ""
        times = (run.median_s, run.min_s, run.max_s, *map(run.parts.get, SHOWN_PARTS))
        median_s, min_s, max_s, *parts = ("" if t is None else f"{t:.4f}" for t in times)
        table.add_row(run.name, median_s, min_s, max_s, f"{run.gb:.2f}", rate, extra, *parts)
    console = Console(width=None if os.isatty(1) else 160)
    console.print(table)
    for run in runs:
        if run.note:
            console.print(f"{run.name}: {run.note}", highlight=False)
