"""A bus that is lost, as commands tell it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from weightbus.cli import outage

SECOND = 10**9


def test_outage_is_told_once_with_its_beginning_and_then_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outage, "LOOK_S", 0)
    looks = iter([True, False, False, False, True, True, False])
    now = iter(range(SECOND, 9 * SECOND, SECOND))
    told: list[str] = []

    class Ended(Exception):
        """The script is over."""

    class Scripted:
        clock: Any = SimpleNamespace(now_ns=lambda: next(now))

        @property
        def is_connected(self) -> bool:
            for look in looks:
                return look
            raise Ended

    bus: Any = Scripted()
    with pytest.raises(Ended):
        anyio.run(outage.tell_outages, bus, told.append)
    assert told == [
        "bus lost, trying since 00:00:01.000Z",
        "",
        "bus lost, trying since 00:00:02.000Z",
    ]
