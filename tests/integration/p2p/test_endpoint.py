"""The transfer engine's edge: what it says when something is missing, gone or silent."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.integration.p2p.source import content, running_source
from tests.integration.p2p.target import Target
from weightbus.bus.endpoint import (
    PROGRESS_S,
    SETTLE_S,
    Endpoint,
    P2pOptions,
    RemoteRead,
    open_endpoint,
    open_endpoint_if_any,
)
from weightbus.bus.errors import EndpointFailed, RemoteReadFailed

MIB = 2**20
SLACK_S = 20.0
"""A loaded machine may be so late; mooncake's own patience is longer."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with open_endpoint("127.0.0.1") as endpoint:
        yield endpoint


def test_endpoint_is_the_same_when_opened_twice(endpoint: Endpoint) -> None:
    with open_endpoint("127.0.0.1") as again:
        assert again is endpoint


@pytest.mark.parametrize("address", ["203.0.113.7", "no-such-host.invalid", ""])
def test_open_fails_when_the_address_is_not_of_this_host(address: str) -> None:
    with pytest.raises(EndpointFailed, match="must be one of this host"), open_endpoint(address):
        pass


def test_read_brings_what_is_registered(endpoint: Endpoint) -> None:
    target = Target([3 * MIB + 5])
    endpoint.register(target.address, target.size_bytes)
    with running_source([3 * MIB + 5]) as source:
        (way,) = source.ways
        endpoint.read(way.session, [RemoteRead(target.address, way.address, 3 * MIB + 5)])
        (word,) = endpoint.read_words(way.session, [way.address + 8])
    endpoint.unregister(target.address)

    target.check()
    assert word == int(content(0, 16).view("<u8")[1])


def test_read_fails_when_the_memory_is_not_registered(endpoint: Endpoint) -> None:
    with running_source([4096]) as source:
        (way,) = source.ways
        endpoint.read_words(way.session, [way.address])
        with pytest.raises(RemoteReadFailed, match=way.session):
            endpoint.read_words(way.session, [way.address + 4096])
        endpoint.read_words(way.session, [way.address])
        source.tell("unregister")
        with pytest.raises(RemoteReadFailed):
            endpoint.read_words(way.session, [way.address])


def test_read_fails_at_once_when_the_peer_is_gone(endpoint: Endpoint) -> None:
    with running_source([4096]) as source:
        (way,) = source.ways
        endpoint.read_words(way.session, [way.address])
        source.kill()
        since = time.monotonic()
        for _ in range(2):
            with pytest.raises(RemoteReadFailed, match=way.session):
                endpoint.read_words(way.session, [way.address])
        assert time.monotonic() - since < PROGRESS_S


@pytest.mark.parametrize("known", [True, False], ids=["known", "new"])
def test_read_fails_in_time_and_holds_up_nobody_when_the_peer_is_stopped(
    endpoint: Endpoint, known: bool
) -> None:
    with running_source([4096]) as stopped, running_source([4096]) as other:
        (way,), (other_way,) = stopped.ways, other.ways
        if known:
            endpoint.read_words(way.session, [way.address])
        stopped.stop()
        since = time.monotonic()
        with pytest.raises(RemoteReadFailed, match=way.session):
            endpoint.read_words(way.session, [way.address])
        assert time.monotonic() - since < PROGRESS_S + SETTLE_S + SLACK_S
        since = time.monotonic()
        endpoint.read_words(other_way.session, [other_way.address])
        assert time.monotonic() - since < PROGRESS_S


def test_register_counts_when_memory_is_registered_twice(endpoint: Endpoint) -> None:
    target = Target([4096])
    endpoint.register(target.address, target.size_bytes)
    endpoint.register(target.address, target.size_bytes)
    with pytest.raises(EndpointFailed, match="registering memory"):
        endpoint.register(target.address + 4096, 4096)
    endpoint.unregister(target.address)
    endpoint.unregister(target.address)
    with pytest.raises(EndpointFailed, match="unregistering memory"):
        endpoint.unregister(target.address)


def run_with_fake(mooncake: str, tmp_path: Path) -> str:
    """What `open_endpoint` says where importing mooncake does as told."""
    package = tmp_path / "mooncake"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "engine.py").write_text(textwrap.dedent(mooncake))
    code = """
        import ctypes
        from weightbus.bus.endpoint import open_endpoint
        from weightbus.bus.errors import EndpointUnavailable
        real = ctypes.CDLL
        def load(name, *args):
            if name in ("libibverbs.so.1", "libnuma.so.1"):
                raise OSError(f"{name}: cannot open shared object file")
            return real(None)
        ctypes.CDLL = load
        try:
            with open_endpoint("127.0.0.1"):
                pass
        except EndpointUnavailable as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def test_open_names_the_missing_libraries_and_their_packages(tmp_path: Path) -> None:
    raises = 'raise ImportError("libibverbs.so.1: cannot open shared object file")'

    assert run_with_fake(raises, tmp_path) == (
        "no transfer engine: mooncake needs libibverbs.so.1, libnuma.so.1. To get it: "
        "apt-get install libibverbs1 libnuma1"
    )


def test_open_names_the_missing_wheel(tmp_path: Path) -> None:
    raises = "raise ModuleNotFoundError(\"No module named 'mooncake'\", name='mooncake')"

    said = run_with_fake(raises, tmp_path)

    assert "the package mooncake is not installed" in said
    assert "'weightbus[p2p-cpu]' where" in said


def test_options_decide_whether_an_unusable_endpoint_is_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = P2pOptions(address="203.0.113.7")
    with pytest.raises(EndpointFailed), open_endpoint_if_any(wanted, "nats://127.0.0.1:4222"):
        pass
    auto = P2pOptions(address="203.0.113.7", required=False)
    with open_endpoint_if_any(auto, "nats://127.0.0.1:4222") as none:
        assert none is None
    assert "203.0.113.7" in caplog.text
    with open_endpoint_if_any(P2pOptions(), "nats://127.0.0.1:4222") as found:
        assert found is not None
        assert found.session.startswith("127.0.0.1:")


def test_start_says_nothing_on_the_terminal() -> None:
    code = """
        from weightbus.bus.endpoint import open_endpoint
        with open_endpoint("127.0.0.1"):
            print("open")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("open\n", "")


class FakeEngine:
    """mooncake's, whose first reads fail after a while."""

    def __init__(self, clock: FakeClock, takes_s: float, failures: int = 1000) -> None:
        self.clock, self.takes_s, self.failures = clock, takes_s, failures

    def get_rpc_port(self) -> int:
        return 1

    def batch_register_memory(self, addresses: list[int], sizes: list[int]) -> int:
        return 0

    def batch_transfer_sync_read(self, *batch: object) -> int:
        self.clock.now_s += self.takes_s
        self.failures -= 1
        return -1 if self.failures >= 0 else 0


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float, /) -> None:
        self.slept_s += seconds


@pytest.mark.parametrize(
    ("takes_s", "reads", "settles_s"), [(0.01, 1, 0.0), (0.01, 2, SETTLE_S), (120.0, 1, SETTLE_S)]
)
def test_failed_read_is_given_time_to_end_unless_it_has_for_certain(
    takes_s: float, reads: int, settles_s: float
) -> None:
    clock = FakeClock()
    endpoint = Endpoint(FakeEngine(clock, takes_s), "127.0.0.1", "tcp", clock)
    endpoint._answering.add("h:1")
    with pytest.raises(RemoteReadFailed):
        endpoint.read("h:1", [RemoteRead(4096 * n, 4096 * n, 8) for n in range(reads)])
    assert clock.slept_s == settles_s


@pytest.mark.parametrize(
    ("takes_s", "failures", "succeeds"),
    [
        pytest.param(0.01, 1, True, id="a new process"),
        pytest.param(0.01, 2, False, id="not registered"),
        pytest.param(PROGRESS_S, 1, False, id="silent"),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["answering", "given up before"])
def test_words_are_read_again_when_an_address_may_have_a_new_process(
    monkeypatch: pytest.MonkeyPatch, takes_s: float, failures: int, succeeds: bool, known: bool
) -> None:
    clock = FakeClock()
    endpoint = Endpoint(FakeEngine(clock, takes_s, failures), "127.0.0.1", "tcp", clock)
    monkeypatch.setattr(endpoint, "probe", lambda session: None)
    if known:
        endpoint._answering.add("h:1")
    with nullcontext() if succeeds else pytest.raises(RemoteReadFailed):
        assert endpoint.read_words("h:1", [4096]) == [0]


@pytest.mark.parametrize("address", [-8, 2**63])
def test_read_fails_when_a_peer_offers_what_is_no_address(endpoint: Endpoint, address: int) -> None:
    with pytest.raises(RemoteReadFailed, match="no address"):
        endpoint.read_words(endpoint.session, [address])


@pytest.mark.parametrize("session", ["h", "h:", "127.0.0.1:99999999", "a" * 200 + ":1"])
def test_read_fails_when_a_peer_offers_what_is_no_session(endpoint: Endpoint, session: str) -> None:
    with pytest.raises(RemoteReadFailed):
        endpoint.read_words(session, [4096])
