"""The results of a run: their form in JSON, and the table on the terminal.

Owns the output file: it is written anew after every part, so that a run that is killed keeps what
it has.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from benchmarks.h200.runs import Kind, kind_of

__all__ = ("Report", "Run", "print_table", "read_report", "run_of", "verdicts", "write_report")

MOST_S: Final = {"gpu_tp4": 0.06, "host_tp2dp2": 0.42}
DIGEST_SHARES: Final[Mapping[Kind, float]] = {"host_tp": 0.05, "gpu_tp": 0.25}
EXTRA_MIB: Final[Mapping[Kind, int]] = {
    "host_tp": 16,
    "gpu_tp": 16,
    "host_dp2": 768,
    "staged_2hosts": 768,
}
"""Targets. Replicas of one host share what is staged; those of `MOST_S` are for four GPUs."""

SHOWN_PARTS: Final = (
    "event_to_plan_s",
    "pause_s",
    "transfer_s",
    "resume_s",
    "publish_s",
    "blocked_s",
)


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
    page_table_bytes: int = 0
    """Of these, what the driver keeps page tables in for the slots that a GPU reads from host
    memory: it does so for all pinned memory, in proportion."""
    parts: dict[str, float]
    """Medians, in seconds."""
    repetitions: tuple[float, ...] = ()
    """Seconds of each."""
    counts: dict[str, float] = {}
    """What is no time: of the requests that ran meanwhile."""
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
    page_table_bytes: int = 0,
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
        page_table_bytes=page_table_bytes,
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


def print_table(
    runs: Sequence[Run],
    judged: Iterable[tuple[str, bool]],
    shown: Sequence[str] = SHOWN_PARTS,
) -> None:
    """With every run's rate and, of ours, the parts that are asked for most.

    Args:
        judged: targets in words, and whether they are met.
        shown: parts that get a column.
    """
    table = Table("run", "median s", "min", "max", "GB", "GB/s", "extra MiB", *shown)
    for run in runs:
        extra = "" if run.extra_gpu_bytes is None else f"{run.extra_gpu_bytes / 2**20:.0f}"
        rate = f"{run.gb / run.median_s:.1f}" if run.median_s else ""
        times = (run.median_s, run.min_s, run.max_s, *map(run.parts.get, shown))
        median_s, min_s, max_s, *parts = ("" if t is None else f"{t:.4f}" for t in times)
        table.add_row(run.name, median_s, min_s, max_s, f"{run.gb:.2f}", rate, extra, *parts)
    console = Console(width=None if os.isatty(1) else 160)
    console.print(table)
    for run in runs:
        if run.note:
            console.print(f"{run.name}: {run.note}", highlight=False)
    for said, met in judged:
        console.print(said, style=None if met else "red", highlight=False)


def verdicts(runs: Sequence[Run]) -> Iterator[tuple[str, bool]]:
    """What the whole model is to reach, as far as it was measured; whether it does."""
    by_name = {run.name: run for run in runs if run.median_s is not None}

    def seconds(name: str) -> float | None:
        return by_name[name].median_s if name in by_name else None

    for name, run in by_name.items():
        for what, found, limit in _figures(name, run, seconds("link_h2d"), seconds("ce_broadcast")):
            met = found <= limit
            yield f"{name}: {what} {found:.4g}, at most {limit:g}{'' if met else ': missed'}", met


def _figures(
    name: str, run: Run, link_s: float | None, theirs_s: float | None
) -> Iterator[tuple[str, float, float]]:
    """(what, figure, target) of one of our runs."""
    kind = kind_of(name)
    if kind not in EXTRA_MIB or run.median_s is None:
        return
    if kind == "host_tp" and link_s:
        yield "times link_h2d", run.median_s / link_s, 1.15
    if kind == "host_tp" and theirs_s:
        yield "of checkpoint-engine's time", run.median_s / theirs_s, 0.2
    if name in MOST_S:
        yield "seconds", run.median_s, MOST_S[name]
    if kind in DIGEST_SHARES and "undigested_transfer_s" in run.parts:
        cost = run.parts["transfer_s"] / run.parts["undigested_transfer_s"] - 1
        yield "share of the transfer that the digest adds", cost, DIGEST_SHARES[kind]
    if run.extra_gpu_bytes is not None:
        extra_bytes = max(0, run.extra_gpu_bytes - run.page_table_bytes)
        what = "MiB of extra GPU memory"
        if run.page_table_bytes:
            what += f", without {run.page_table_bytes / 2**20:.0f} of page tables,"
        yield what, extra_bytes / 2**20, EXTRA_MIB[kind]
    yield "seconds from the event to the plan", run.parts["event_to_plan_s"], 0.010
