"""How much of a link the bytes of a stage used, together with all else that went over it then.

Does no I/O. Which link a stage takes, `tracing.links` says; what it can do was measured on the
engine's host and is in `Join.links`. What crosses a network goes no faster than the cards, nor than
what drives them: the slower of the two is the link. Several ranks share one link: memory, disk and
cards are the host's; the transfer engine is that of one consumer; a GPU has a link to its host of
its own, reads its peers by itself, and receives broadcasts by itself.

The bytes of a stage are taken to be spread evenly over its time. Its share is what went over its
link from its start to its end, for all stages of the round that share the link, over what the link
could have moved in that time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Final

from msgspec import Struct, structs

from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.rounds import Join, RoundPlan
from weightbus.tracing.links import limiting_link, link_of, link_rate, source_of
from weightbus.tracing.waterfall import LinkName, StageRow

__all__ = ("LinkUser", "share_links")

CPU: Final = "cpu"
"""How the device of a rank without a GPU begins."""

Key = tuple[str, ...]
"""Equal keys: one link."""


class LinkUser(Struct, frozen=True, kw_only=True):
    """One engine that moved bytes, as far as it is known."""

    join: Join | None
    plan: RoundPlan | None
    """The last that names it."""
    ready: CheckpointReady | None
    """Of the version."""
    rows: Sequence[StageRow]
    """Without links."""


def share_links(users: Mapping[str, LinkUser]) -> dict[str, tuple[StageRow, ...]]:
    """Engine id -> its rows, with their links and shares."""
    named = {
        engine: [structs.replace(row, link=_link(row, user)) for row in user.rows]
        for engine, user in users.items()
    }
    sharing: dict[Key, list[StageRow]] = {}
    for engine, rows in named.items():
        for row in rows:
            sharing.setdefault(_key(engine, row, users[engine].join), []).append(row)
    moved = {key: _moved_bytes(rows) for key, rows in sharing.items()}

    def shared(engine: str, row: StageRow) -> StageRow:
        join = users[engine].join
        rate = None if join is None else link_rate(join.links, row.link, ranks=1)
        if rate is None or not row.bytes or row.duration_s <= 0:
            return row
        by_then = moved[_key(engine, row, join)]
        moved_bytes = by_then[row.start_s + row.duration_s] - by_then[row.start_s]
        return structs.replace(row, link_share=moved_bytes / row.duration_s / rate)

    return {engine: tuple(shared(engine, row) for row in rows) for engine, rows in named.items()}


def _link(row: StageRow, user: LinkUser) -> LinkName:
    """The link that the bytes of a stage took; empty if it is not known."""
    join = user.join
    if join is None or not row.bytes:
        return ""
    gpu = any(not rank.device.startswith(CPU) for rank in join.ranks if rank.rank == row.rank)
    source = "" if user.ready is None else source_of(user.ready, join.host_id, gpu=gpu)
    lanes = user.plan is not None and user.plan.device
    link = link_of(row.stage, row.route, source, gpu=gpu, device_lanes=lanes)
    return limiting_link(link, source, join.links)


def _key(engine: str, row: StageRow, join: Join | None) -> Key:
    match row.link:
        case "memory" | "disk" | "network" if join is not None:
            return (row.link, join.host_id)
        case "p2p":
            return (row.link, "", engine)
    return (row.link, "", engine, str(row.rank))


def _moved_bytes(rows: Iterable[StageRow]) -> dict[float, float]:
    """Time -> what had moved by then, at the start and the end of every row."""
    changes: list[tuple[float, float]] = []
    for row in rows:
        if row.bytes and row.duration_s > 0:
            rate = row.bytes / row.duration_s
            changes += [(row.start_s, rate), (row.start_s + row.duration_s, -rate)]
    moved: dict[float, float] = {}
    before_s = rate = total = 0.0
    for time_s, at_once in groupby(sorted(changes), key=lambda change: change[0]):
        total += rate * (time_s - before_s)
        moved[time_s] = total
        before_s = time_s
        rate += sum(change for _, change in at_once)
    return moved
