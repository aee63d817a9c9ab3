"""How the members of a group wait for each other in their store."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from weightbus.consumers.transfer.agreement import Post, _wait_key

PATIENCE_S = 0.5
MOST_LOOKS = 100


class Keys:
    """A store in which nothing is ever set."""

    looks = 0

    def check(self, names: Sequence[str]) -> bool:
        self.looks += 1
        return False


def test_store_is_asked_seldom_when_a_member_is_late() -> None:
    keys, end = Keys(), time.monotonic() + PATIENCE_S
    with pytest.raises(TimeoutError, match="place 1 was not set in time"):
        _wait_key(keys, "place 1", Post, lambda: time.monotonic() >= end)
    assert keys.looks <= MOST_LOOKS, f"{keys.looks} looks in {PATIENCE_S} s"
