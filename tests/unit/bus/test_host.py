"""The id of this host."""

from __future__ import annotations

import msgspec

from weightbus.bus.host import host_id
from weightbus.schemas.placement import HostId


def test_host_id_is_the_same_and_a_host_id_when_asked_twice() -> None:
    assert host_id() == host_id()
    assert msgspec.convert(host_id(), HostId) == host_id()
