"""Hosts with a real network between them: namespaces on one bridge, with rates, cuts and counters.

Owns one bridge per `open_network`, and for every host a namespace and the veth pair that ties it to
the bridge; all of it ends with the context. What a killed test run has left is swept by the next
one: every name holds the process id of its owner. /dev/shm is not divided: hosts of these tests
need host ids of their own.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ("Host", "Network", "open_network", "why_no_network")

COMMAND_S = 60.0
"""How long one change of the network may take."""

LOCK = Path(tempfile.gettempdir()) / "weightbus-networks.lock"
"""Held while subnets are chosen, and while names are swept."""

SUBNETS = tuple(f"198.{18 + n // 256}.{n % 256}" for n in range(512))
"""Of the range that RFC 2544 has set aside for tests of networks."""

NAMES = re.compile(r"^wb(\d+)(?:h\d+)?$")
MTU_BYTES = 1500
BURST_S = 0.01
"""So long a limited link may send at once: the kernel's timers are not finer."""
LATENCY = "200ms"
"""How long a packet may wait at a limited link before it is dropped."""


class NetworkRefused(Exception):
    """The kernel, or the lack of a program, forbids it; says what."""


@dataclass(frozen=True)
class Host:
    """One host of the network."""

    name: str
    """Of its namespace, and of its end on the bridge."""
    address: str
    id: str
    """A host id for the consumers that run on it."""

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` there; the process is the command's own."""
        return ["ip", "netns", "exec", self.name, *argv]

    @property
    def sent_bytes(self) -> int:
        """What has left the host so far, headers included."""
        return self._counter("rx_bytes")  # of the bridge's end of its cable

    @property
    def received_bytes(self) -> int:
        """What has come to the host so far, headers included."""
        return self._counter("tx_bytes")

    def limit(self, bytes_per_s: int) -> None:
        """Let no more than this through, each way."""
        burst = max(int(bytes_per_s * BURST_S), 8 * MTU_BYTES)
        rate = ("tbf", "rate", f"{8 * bytes_per_s}bit", "burst", f"{burst}b", "latency", LATENCY)
        _run("tc", "qdisc", "replace", "dev", self.name, "root", *rate)
        _run("tc", "-n", self.name, "qdisc", "replace", "dev", "eth0", "root", *rate)

    def cut(self) -> None:
        """Pull the cable: what is sent is lost, and nobody is told."""
        _run("ip", "link", "set", self.name, "down")

    def heal(self) -> None:
        _run("ip", "link", "set", self.name, "up")

    @contextmanager
    def is_cut(self) -> Iterator[None]:
        self.cut()
        try:
            yield
        finally:
            self.heal()

    def _counter(self, name: str) -> int:
        return int(Path(f"/sys/class/net/{self.name}/statistics/{name}").read_text("ascii"))


@dataclass(frozen=True)
class Network:
    """Hosts on a bridge; whoever runs outside of all namespaces has the bridge's address."""

    bridge: str
    address: str
    hosts: tuple[Host, ...]


@cache
def why_no_network() -> str:
    """Why there can be none here; empty: there can."""
    if os.geteuid() != 0:
        return "network namespaces are made by root only"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"network namespaces need {program} of iproute2"
    try:
        with open_network(2) as network:
            first, second = network.hosts
            first.limit(10**6)
            _run(*first.command(["true"]))
            ping = 'exec 3<>"/dev/udp/$0/9"; echo >&3'
            _run(*first.command(["bash", "-c", ping, second.address]))
    except NetworkRefused as refused:
        return f"this kernel makes no network: {refused}"
    return ""


@contextmanager
def open_network(hosts: int) -> Iterator[Network]:
    """A network of so many hosts.

    Raises:
        NetworkRefused: it cannot be made here.
    """
    owner = f"wb{os.getpid()}"
    try:
        with _alone():
            _sweep()
            subnet = _free_subnet()
            _run("ip", "link", "add", owner, "type", "bridge")
            _run("ip", "address", "add", f"{subnet}.1/24", "dev", owner)
        _run("ip", "link", "set", owner, "up")
        made = tuple(_add_host(owner, subnet, number) for number in range(hosts))
        yield Network(bridge=owner, address=f"{subnet}.1", hosts=made)
    finally:
        with _alone():
            _remove(owner)


def _add_host(bridge: str, subnet: str, number: int) -> Host:
    name, address = f"{bridge}h{number}", f"{subnet}.{number + 2}"
    _run("ip", "netns", "add", name)
    pair = ("type", "veth", "peer", "name", "eth0", "netns", name)
    _run("ip", "link", "add", name, *pair)
    _run("ip", "link", "set", name, "master", bridge, "up")
    _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
    _run("ip", "-n", name, "link", "set", "eth0", "up")
    _run("ip", "-n", name, "link", "set", "lo", "up")
    return Host(name=name, address=address, id=f"host-{number}")


def _free_subnet() -> str:
    """One that no interface of this machine has."""
    interfaces = json.loads(_run("ip", "-json", "address"))
    taken = {
        address["local"].rpartition(".")[0]
        for interface in interfaces
        for address in interface.get("addr_info", ())
    }
    return next(subnet for subnet in SUBNETS if subnet not in taken)


def _sweep() -> None:
    """Remove what owners have left that are gone."""
    for name in {*_interfaces(), *_namespaces()}:
        if (found := NAMES.match(name)) and not Path(f"/proc/{found[1]}").exists():
            _remove(f"wb{found[1]}")


def _remove(owner: str) -> None:
    """End every process of an owner's hosts, then the hosts, then the bridge."""
    ours = re.compile(rf"^{owner}(h\d+)?$")
    for name in filter(ours.match, _namespaces()):
        for pid in _run("ip", "netns", "pids", name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _run("ip", "netns", "delete", name)
    # The namespace takes its end of the cable along a little later: do not rely on it.
    for name in filter(ours.match, _interfaces()):
        with suppress(NetworkRefused):
            _run("ip", "link", "delete", name)


def _interfaces() -> list[str]:
    return os.listdir("/sys/class/net")


def _namespaces() -> list[str]:
    with suppress(FileNotFoundError):
        return os.listdir("/run/netns")
    return []


@contextmanager
def _alone() -> Iterator[None]:
    """No other test run looks for a subnet, or sweeps, meanwhile."""
    with LOCK.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(*argv: str) -> str:
    """
    Raises:
        NetworkRefused: it failed; says what it said.
    """
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    except subprocess.TimeoutExpired:
        raise NetworkRefused(f"{' '.join(argv)}: not within {COMMAND_S:g} s") from None
    if done.returncode != 0:
        raise NetworkRefused(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
