"""What came of the demo, as one struct and as one line. Does no I/O."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from weightbus.cli.demo.story import Checked
from weightbus.tracing.text import counted

__all__ = ("EngineResult", "Result", "result_of", "verdict")


class EngineResult(Struct, frozen=True):
    """Where one engine ended."""

    version: int
    verified: bool
    routes: tuple[str, ...]
    """All that it took, over all versions."""


class Result(Struct, frozen=True, kw_only=True):
    """What `--json` prints as the last line."""

    ok: bool
    """Every version was verified in every engine that was there, and every route was taken."""
    versions: tuple[int, ...]
    engines: dict[str, EngineResult]
    routes_used: tuple[str, ...]
    routes_promised: tuple[str, ...]
    """Fewer are a failure, unless the transfer engine is missing."""
    routes_missing: str = ""
    """Why only `local` was shown, and what to install; empty: nothing was left out."""
    update_seconds: tuple[float, ...]
    """From hearing of a version to serving it, for every update, in order."""
    trace_ids: tuple[str, ...]


def result_of(
    checked: Sequence[Checked], dead_letters: int, missing: str, promised: Sequence[str]
) -> Result:
    """
    Args:
        missing: why there is no transfer engine here; empty: there is one.
        promised: the routes that are to be shown if there is one, in order of their names.
    """
    of_engine: dict[str, list[Checked]] = {}
    for each in checked:
        of_engine.setdefault(each.spec.engine, []).append(each)
    updates = [each.update for each in checked]
    routes = _routes(checked)
    verified = not dead_letters and not any(each.faults for each in checked)
    return Result(
        ok=verified and (bool(missing) or routes == tuple(promised)),
        versions=tuple(sorted({update.version for update in updates})),
        engines={
            engine: EngineResult(
                version=of_engine[engine][-1].update.version,
                verified=not any(each.faults for each in of_engine[engine]),
                routes=_routes(of_engine[engine]),
            )
            for engine in sorted(of_engine)
        },
        routes_used=routes,
        routes_promised=tuple(promised),
        routes_missing=missing,
        update_seconds=tuple(round(each.seconds, 6) for each in checked),
        trace_ids=tuple(dict.fromkeys(update.trace_id for update in updates)),
    )


def verdict(result: Result) -> str:
    """The last line for people."""
    updates = counted(len(result.update_seconds), "update")
    told_of = f"{updates}, {counted(len(result.trace_ids), 'trace')}"
    if not result.ok:
        never = [route for route in result.routes_promised if route not in result.routes_used]
        told = f"; never taken: {', '.join(never)}" if never and not result.routes_missing else ""
        return f"NOT EVERYTHING WAS VERIFIED: {told_of}{told}"
    if result.routes_missing:
        return f"everything was verified: {told_of}, by local ALONE: {result.routes_missing}"
    return f"everything was verified: {told_of}, by {', '.join(result.routes_used)}"


def _routes(checked: Sequence[Checked]) -> tuple[str, ...]:
    return tuple(sorted({route for each in checked for route in each.update.routes}))
