"""The picture of a report, for the README. matplotlib (the extra `bench`) is imported when used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks.h200.report import Report, Run
from benchmarks.h200.runs import Kind, kind_of

__all__ = ("plot_report",)

SHOWN: Final[Mapping[Kind, str]] = {
    "ce_broadcast": "checkpoint-engine\ngather_metas + broadcast update",
    "staged_2hosts": "Weight bus, engines of TP{half}\non two virtual hosts",
    "host_dp2": "Weight bus, host memory\nto two TP{half} engines",
    "host_tp": "Weight bus, host memory\nto one TP{gpus} engine",
    "link_h2d": "the link itself\nmemcpy host to GPUs",
    "gpu_tp": "Weight bus, trainer GPUs\nto one TP{gpus} engine",
    "link_peer": "the link itself\nmemcpy between GPUs",
}
"""From the top."""
THEIRS, OURS, LINK = "#b8b8b8", "#2563eb", "#94c5f8"


def plot_report(report: Report, path: Path) -> None:
    """A bar for each run, from its least to its most with the median written at its end.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("a plot needs matplotlib: pip install 'weightbus[bench]'") from None
    gpus = report.machine.get("gpus") or ["CPU"]
    runs = {kind_of(run.name): run for run in report.runs if run.median_s is not None}
    kinds = [kind for kind in reversed(list(SHOWN)) if kind in runs]
    shown = [runs[kind] for kind in kinds]
    figure, axes = pyplot.subplots(figsize=(8.5, 0.75 * len(shown) + 1.2))
    medians = [run.median_s or 0.0 for run in shown]
    spreads = [
        [m - (run.min_s or m) for m, run in zip(medians, shown, strict=True)],
        [(run.max_s or m) - m for m, run in zip(medians, shown, strict=True)],
    ]
    axes.barh(
        [SHOWN[kind].format(gpus=len(gpus), half=max(1, len(gpus) // 2)) for kind in kinds],
        medians,
        xerr=spreads,
        color=[_colour(run) for run in shown],
        ecolor="#404040",
        capsize=3,
    )
    for place, run in enumerate(shown):
        end = run.max_s or 0.0
        axes.annotate(
            f"{run.median_s:.3f} s",
            (end, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xlim(0, 1.15 * max((run.max_s or 0.0 for run in shown), default=1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds until every rank's parameters are written (median, min to max)")
    size_gb = report.checkpoint["bytes"] / 1e9
    axes.set_title(
        f"{report.checkpoint['model']}, {size_gb:.1f} GB in {report.checkpoint['tensors']:,} "
        f"tensors, on {len(gpus)} x {gpus[0]}",
        fontsize=10,
        loc="left",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=160)


def _colour(run: Run) -> str:
    if run.name.startswith("link"):
        return LINK
    return THEIRS if run.name.startswith("ce") else OURS
