"""The rows of the benchmark, and what is asked of them. Does no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal, get_args

from benchmarks.h200.report import Run

__all__ = ("KINDS", "SHOWN", "Kind", "run_name", "verdicts")

Kind = Literal["link_h2d", "weightbus_host", "weightbus_gpu", "vllm_reload", "checkpoint_engine"]
"""As the command takes them."""

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
"""In this order: files of a version take the place of our slots."""

SHOWN: Final = (
    "event_to_plan_s",
    "pause_s",
    "transfer_s",
    "prove_s",
    "resume_s",
    "paused_s",
)

LONGEST_BESIDE_S: Final = 0.05
"""Requests wait at most so much longer than the transfer takes."""
TIMES_FASTER: Final = {"checkpoint_engine": 5.0, "vllm_reload": 20.0}


def run_name(kind: Kind, tp: int) -> str:
    """How a run is called: `weightbus_host` with 4 ranks is `weightbus_host_tp4`."""
    return f"{kind}_tp{tp}" if kind.startswith("weightbus_") else kind


def verdicts(runs: Sequence[Run]) -> Iterator[tuple[str, bool]]:
    """What is to be reached, as far as it was measured; whether it is."""
    medians = {run.name: run.median_s for run in runs if run.median_s}
    for run in runs:
        if run.name.startswith("weightbus_") and run.median_s:
            yield from _verdicts(run, run.median_s, medians)


def _verdicts(run: Run, seconds: float, medians: dict[str, float]) -> Iterator[tuple[str, bool]]:
    if link_s := medians.get("link_h2d"):
        yield f"{run.name}: times link_h2d {seconds / link_s:.3g}", True
    for other, least in TIMES_FASTER.items():
        if other in medians:
            times = medians[other] / seconds
            yield _held(f"{run.name}: times as fast as {other}", times, least, least <= times)
    beside_s = run.parts["paused_s"] - run.parts["transfer_s"]
    what = f"{run.name}: seconds that requests wait longer than the transfer"
    yield _held(what, beside_s, LONGEST_BESIDE_S, beside_s <= LONGEST_BESIDE_S, "at most")
    for count in ("requests_failed", "tokens_lost"):
        if count in run.counts:
            found = run.counts[count]
            said = count.replace("_", " ")
            yield _held(f"{run.name}: {said}", found, 0, found == 0, "at most")


def _held(
    what: str, found: float, limit: float, met: bool, bound: str = "at least"
) -> tuple[str, bool]:
    return f"{what} {found:.4g}, {bound} {limit:g}{'' if met else ': missed'}", met
