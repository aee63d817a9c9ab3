"""The id of this host, and its address."""

from __future__ import annotations

import msgspec
import pytest

from weightbus.bus.errors import BusUnavailable, HostUnknown
from weightbus.bus.host import address_towards, host_id
from weightbus.schemas.placement import HostId


def test_host_id_is_the_same_and_a_host_id_when_asked_twice() -> None:
    assert host_id() == host_id()
    assert msgspec.convert(host_id(), HostId) == host_id()


@pytest.mark.parametrize(
    "url",
    [
        "nats://127.0.0.1:4222",
        "nats://user:secret@127.0.0.1",
        "127.0.0.1:4222",
        "tls://127.0.0.1:4222,nats://203.0.113.1:4222",
    ],
)
def test_address_is_loopback_when_the_server_is(url: str) -> None:
    assert address_towards(url) == "127.0.0.1"


@pytest.mark.parametrize("url", ["", "nats://", "nats://h:port"])
def test_address_is_unknown_when_there_is_no_way_to_the_server(url: str) -> None:
    with pytest.raises(HostUnknown, match="no address of this host towards"):
        address_towards(url)


def test_name_that_is_not_known_is_told_with_the_url_and_without_its_password() -> None:
    with pytest.raises(BusUnavailable) as raised:
        address_towards("nats://user:secret@no-such-host.invalid:4222")
    told = "bus nats://no-such-host.invalid:4222 is not available: host name no-such-host.invalid"
    assert str(raised.value).startswith(f"{told} is not known (")
