"""The network itself: bytes cross it, at the rate that was set, unless it is cut."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.integration.network import traffic
from tests.integration.network.namespaces import Host, Network, open_network

DEADLINE_S = 60.0
POLL_S = 0.01
RATE_BYTES_PER_S = 4_000_000
SIZE_BYTES = 4_000_000
HEADERS = 1.15
"""What headers and acknowledgements may add."""


def start(host: Host, *words: object) -> subprocess.Popen[str]:
    argv = [sys.executable, "-I", str(Path(traffic.__file__)), *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(host.command(argv), stdin=pipe, stdout=pipe, text=True)


class Flow:
    """Bytes on their way from one host to another."""

    def __init__(self, receiver: subprocess.Popen[str], sender: subprocess.Popen[str]) -> None:
        self._receiver = receiver
        self.sender = sender

    @property
    def received_bytes(self) -> int:
        assert self._receiver.stdin is not None
        assert self._receiver.stdout is not None
        self._receiver.stdin.write("\n")
        self._receiver.stdin.flush()
        return int(self._receiver.stdout.readline())

    def wait(self, size_bytes: int) -> None:
        """Until so many bytes have come."""
        until(lambda: self.received_bytes >= size_bytes, f"{size_bytes} bytes have come")


@contextmanager
def flow(source: Host, target: Host, size_bytes: int) -> Iterator[Flow]:
    with start(target, "receive", target.address, traffic.PORT) as receiver:
        try:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "ready\n"
            send = ("send", target.address, traffic.PORT, size_bytes)
            with start(source, *send) as sender:
                try:
                    yield Flow(receiver, sender)
                finally:
                    sender.kill()
        finally:
            receiver.kill()


def until(is_so: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < give_up, f"{what}: not within {DEADLINE_S:g} s"
        time.sleep(POLL_S)


def test_bytes_cross_and_are_counted_when_one_host_sends_to_another(network: Network) -> None:
    source, target, idle = network.hosts
    before = source.sent_bytes, target.received_bytes, idle.received_bytes
    with flow(source, target, SIZE_BYTES) as flowing:
        flowing.wait(SIZE_BYTES)
    sent, received, elsewhere = (
        after - counted
        for after, counted in zip(
            (source.sent_bytes, target.received_bytes, idle.received_bytes), before, strict=True
        )
    )
    for counted in (sent, received):
        assert SIZE_BYTES <= counted <= SIZE_BYTES * HEADERS, counted
    assert elsewhere < SIZE_BYTES / 100


def test_rate_is_kept_when_a_host_is_limited(network: Network) -> None:
    source, target, _ = network.hosts
    target.limit(RATE_BYTES_PER_S)
    with flow(source, target, SIZE_BYTES) as flowing:
        flowing.wait(1)
        begin, counted = time.monotonic(), target.received_bytes
        flowing.wait(SIZE_BYTES)
        came = target.received_bytes - counted
        took_s = time.monotonic() - begin
    rate = came / took_s  # not what a process has read: it may be late, and then read all at once
    assert RATE_BYTES_PER_S / 10 < rate < RATE_BYTES_PER_S * 1.2, f"{rate / 1e6:.2f} MB/s"


def test_bytes_stop_and_go_on_when_a_cable_is_pulled_and_put_back(network: Network) -> None:
    source, target, _ = network.hosts
    source.limit(RATE_BYTES_PER_S)
    with flow(source, target, SIZE_BYTES) as flowing:
        flowing.wait(SIZE_BYTES // 8)
        with target.is_cut():
            cut_at = target.received_bytes
            begin = time.monotonic()
            until(lambda: time.monotonic() > begin + 0.5, "half a second of it")
            assert target.received_bytes == cut_at
            assert flowing.sender.poll() is None
        flowing.wait(SIZE_BYTES)
        assert flowing.sender.wait(DEADLINE_S) == 0


def test_nothing_is_left_when_a_network_ends_or_its_owner_was_killed(needs_network: None) -> None:
    script = (
        "from tests.integration.network.namespaces import open_network\n"
        "import os, signal\n"
        "with open_network(1) as network:\n"
        "    print(network.bridge, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[3]
    killed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    bridge = killed.stdout.strip()
    assert bridge in os.listdir("/sys/class/net")
    with open_network(1) as network:
        assert bridge not in os.listdir("/sys/class/net")
        assert f"{bridge}h0" not in os.listdir("/run/netns")
        names = {network.bridge, network.hosts[0].name}
    assert not names & {*os.listdir("/sys/class/net"), *os.listdir("/run/netns")}
