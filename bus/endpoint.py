"""The transfer engine: reads registered memory of other hosts. The only module that knows mooncake.

Owns one mooncake `TransferEngine` per address, protocol and device, made when it is first asked for
and kept until the process ends: ending one is not safe while a peer reads. Blocking, for threads;
mooncake releases the interpreter's lock while it moves bytes. Imports it when it is needed only.

What mooncake does, and what is done about it here:
- Whoever reads a peer for the first time holds a lock of the whole engine until the peer answers,
  for 60 s if it is stopped. So a peer is asked for a sign of life first, over its handshake port.
- A peer that stops in the middle fails a read after `PROGRESS_S`. Its own default is 30 s.
- A batch of several reads fails with the first of them, while others may be under way: it is given
  `SETTLE_S` to end. A read by itself has ended when it fails at once.
- A peer that is started anew at the address of an earlier one is taken for that one: it is looked
  at twice (`Endpoint.read_words`), and ports are taken from a wide range. If it offers its bytes at
  another port than the earlier one, it stays out of reach for who read that one.
- What trickles in for longer than `TRANSFER_S` is given up while it is under way: it, and whatever
  else has failed after a while, is given `SETTLE_S`, too, so that nothing of it falls into bytes
  that are read again from somebody else.
- It tells of its start on stderr, past `logging`: see `weightbus.bus.quiet`. Errors that it tells
  of later stay: they say why a peer is lost.
- A batch of thousands fails, and with it all that follows: `MAX_ENTRIES`.
- It accepts any address to be reached under, so `open_endpoint` looks whether it is one of ours.
- Who can reach the port can read *and write* what is registered: trust the network, or do not
  register. The digest proves what was read.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, Final, NamedTuple, Protocol

from msgspec import Struct

from weightbus.bus.blocks import SharedBlock
from weightbus.bus.errors import (
    EndpointFailed,
    EndpointUnavailable,
    HostUnknown,
    RemoteReadFailed,
)
from weightbus.bus.host import address_towards, why_not_own_address
from weightbus.bus.quiet import quietly
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES

__all__ = (
    "MAX_BATCH_BYTES",
    "MAX_ENTRIES",
    "PROGRESS_S",
    "PROTOCOLS",
    "SETTLE_S",
    "Endpoint",
    "P2pOptions",
    "RemoteRead",
    "open_endpoint",
    "open_endpoint_if_any",
    "register_block",
    "unregister_block",
)

_logger = logging.getLogger(__name__)

PROTOCOLS: Final = ("tcp", "rdma", "efa", "barex")
"""What mooncake moves bytes between hosts by; an installed one may lack some, and says so."""

MAX_ENTRIES: Final = 256
"""Reads in one batch; 2,000 still work in mooncake 0.3.13, 4,000 do not."""

MAX_BATCH_BYTES: Final = 64 * 2**20
"""Of one batch."""

PROGRESS_S: Final = 5.0
"""A read that makes no progress for so long has failed."""

TRANSFER_S: Final = 120.0
"""The longest that a batch may take, progress or not."""

SETTLE_S: Final = 1.0
"""For reads whose connection was dropped to end."""

MAX_ADDRESS: Final = 2**63 - 1

_ENVIRONMENT: Final = {
    "MC_TCP_PROGRESS_TIMEOUT_SEC": f"{PROGRESS_S:.0f}",
    "MC_TCP_STATUS_TIMEOUT_SEC": f"{PROGRESS_S:.0f}",
    "MC_HANDSHAKE_CONNECT_TIMEOUT": f"{PROGRESS_S:.0f}",
    "MC_TRANSFER_TIMEOUT": f"{TRANSFER_S:.0f}",
    "MC_MIN_RPC_PORT": "15000",
    "MC_MAX_RPC_PORT": "32767",  # its own 2,000 ports meet again too soon; above are the kernel's
    "MC_LOG_LEVEL": "ERROR",
}
"""Read by mooncake when it is loaded; what is set already stays."""

_LIBRARIES: Final = {
    "libibverbs.so.1": "libibverbs1",
    "librdmacm.so.1": "librdmacm1",
    "libnuma.so.1": "libnuma1",
    "libcurl.so.4": "libcurl4",
}
"""What the wheels need of the system -> Debian's package."""

_PROBE: Final = struct.pack("<QB", 3, 3) + b"{}"
"""Length, type 3 (probe) and body of a handshake. A version that does not know it hangs up."""

_WORDS: Final = 8192
"""Words of scratch memory, used in turn: a failed read of one is long over when it comes again."""


class P2pOptions(Struct, frozen=True, kw_only=True):
    """How this process takes part in transfers between hosts."""

    address: str = ""
    """Of this host, under which others reach it; empty: by which it reaches the bus."""
    protocol: str = "tcp"
    """`tcp`, `rdma`, ... as the installed mooncake knows them."""
    device: str = ""
    """Network devices to use, comma-separated; empty: all."""
    required: bool = True
    """Whether it is an error if there is no transfer engine to be had; otherwise a warning."""


class RemoteRead(NamedTuple):
    """One run of bytes to be read."""

    here: int
    """Address in registered memory of this process."""
    there: int
    """Address in registered memory of the peer."""
    size_bytes: int


class Clock(Protocol):
    """What this needs of the module `time`."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


class Endpoint:
    """One transfer engine; of `open_endpoint`. For several threads."""

    session: str
    """What peers call this process: `host:port`."""
    protocol: str

    def __init__(self, engine: Any, address: str, protocol: str, clock: Clock = time) -> None:
        self._engine, self._time = engine, clock
        self.protocol = protocol
        self.session = f"{address}:{engine.get_rpc_port()}"
        self._answering: set[str] = set()
        self._registered: dict[int, tuple[int, int]] = {}
        """Address -> (bytes, how often it was registered; 0: the engine would not forget it)."""
        self._registering = threading.Lock()
        self._scratch = mmap.mmap(-1, 8 * _WORDS)
        self._words = memoryview(self._scratch).cast("Q")
        self._words_address = ctypes.addressof(ctypes.c_char.from_buffer(self._scratch))
        self._turns = count()
        self.register(self._words_address, 8 * _WORDS)

    def register(self, address: int, size_bytes: int) -> None:
        """Let peers read this memory, and let reads go to it; it must stay mapped.

        The same memory may be registered several times: until it is unregistered as often.

        Raises:
            EndpointFailed: it overlaps other registered memory, which is named, or the device
                refuses it.
        """
        with self._registering:
            known_bytes, times = self._registered.get(address, (size_bytes, 0))
            if not times or known_bytes != size_bytes:
                code = self._engine.batch_register_memory([address], [size_bytes])
                if code != 0:
                    value = f"{size_bytes:,} bytes at {address:#x}"
                    reason = f"code {code}{self._overlapped(address, size_bytes)}"
                    raise EndpointFailed("registering memory", value, reason)
            self._registered[address] = size_bytes, times + 1

    def unregister(self, address: int) -> None:
        """Peers cannot read it any more: their reads fail.

        Raises:
            EndpointFailed: it is not registered.
        """
        with self._registering:
            size_bytes, times = self._registered.pop(address, (0, 1))
            if times > 1:
                self._registered[address] = size_bytes, times - 1
                return
            code = self._engine.batch_unregister_memory([address])
            if code != 0:
                if size_bytes:
                    self._registered[address] = size_bytes, 0
                value = f"address {address:#x}"
                raise EndpointFailed("unregistering memory", value, f"code {code}")

    def read(self, session: str, reads: Sequence[RemoteRead]) -> None:
        """Read one batch from a peer. Blocking; ends `PROGRESS_S` after the last progress.

        Raises:
            RemoteReadFailed: some of it was not read.
        """
        if not reads:
            return
        size_bytes = sum(read.size_bytes for read in reads)
        assert len(reads) <= MAX_ENTRIES, "a batch is bounded"
        assert size_bytes <= MAX_BATCH_BYTES, "a batch is bounded"
        here, there, sizes = zip(*reads, strict=True)
        if not 0 <= min(there) <= max(there) <= MAX_ADDRESS:  # said by a peer: not to be trusted
            raise RemoteReadFailed(session, size_bytes, f"there is no address {min(there):#x}")
        self._contact(session, size_bytes)
        since_s = self._time.monotonic()
        code = self._engine.batch_transfer_sync_read(session, here, there, sizes)
        if code != 0:
            self._answering.discard(session)
            if len(reads) > 1 or self._time.monotonic() - since_s >= SETTLE_S:
                self._time.sleep(SETTLE_S)
            reason = f"code {code}: it is gone, or silent, or has this memory not registered"
            raise RemoteReadFailed(session, size_bytes, reason)

    def read_words(self, session: str, addresses: Sequence[int]) -> list[int]:
        """The 8-byte little-endian words at addresses of a peer, many at a time. Blocking.

        It is how a peer is looked at before its bytes are read, so it is what finds out that the
        peer is a new process at the address of an old one: mooncake, which goes on with what it
        knew of the old one, however long ago, fails, and the words are read again.

        Raises:
            RemoteReadFailed: one of them cannot be read.
        """
        words = []
        for first in range(0, len(addresses), MAX_ENTRIES):
            some = addresses[first : first + MAX_ENTRIES]
            places = [next(self._turns) % _WORDS for _ in some]
            reads = [
                RemoteRead(self._words_address + 8 * place, address, 8)
                for place, address in zip(places, some, strict=True)
            ]
            since_s = self._time.monotonic()
            try:
                self.read(session, reads)
            except RemoteReadFailed:
                if self._time.monotonic() - since_s >= PROGRESS_S:
                    raise
                self.read(session, reads)
            words += [self._words[place] for place in places]
        return words

    def probe(self, session: str) -> None:
        """Whether a peer answers at all. Blocking, for `PROGRESS_S` at most.

        Raises:
            RemoteReadFailed
        """
        host, _, port = session.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), PROGRESS_S) as connection:
                connection.settimeout(PROGRESS_S)
                connection.sendall(_PROBE)
                while connection.recv(4096):  # to the end: it waits for us to hang up
                    pass
        except ConnectionResetError:
            return  # it lives: it has refused what it does not know
        except TimeoutError as error:
            raise RemoteReadFailed(session, 0, f"no answer for {PROGRESS_S:g} s") from error
        except (OSError, ValueError, OverflowError) as error:
            raise RemoteReadFailed(session, 0, str(error) or type(error).__name__) from error

    def _overlapped(self, address: int, size_bytes: int) -> str:
        """What is registered here already, for messages. Two live mappings never overlap: unless
        the caller asks for a part of what is registered, that was unmapped too early."""
        found = [
            f"{known_bytes:,} bytes at {known:#x}, " + (f"{times} times" if times else "for good")
            for known, (known_bytes, times) in sorted(self._registered.items())
            if known < address + size_bytes and address < known + known_bytes
        ]
        return f"; registered there, and never unregistered: {'; '.join(found)}" if found else ""

    def _contact(self, session: str, size_bytes: int) -> None:
        if session in self._answering:
            return
        try:
            self.probe(session)
        except RemoteReadFailed as error:
            raise RemoteReadFailed(session, size_bytes, error.reason) from error
        self._answering.add(session)


_opened: dict[tuple[str, str, str], Endpoint] = {}
_opening = threading.Lock()


@contextmanager
def open_endpoint(address: str, protocol: str = "tcp", device: str = "") -> Iterator[Endpoint]:
    """This process's endpoint, under an address of this host. Blocking: loads mooncake.

    The same arguments give the same endpoint, which stays open after this ends: memory must be
    unregistered by whoever registered it.

    Args:
        protocol: one of `PROTOCOLS`, if the installed mooncake has it.
        device: which network devices to use, comma-separated; empty: all of them.

    Raises:
        EndpointUnavailable: mooncake, or a library that it needs, is not installed.
        EndpointFailed: the address is not one of this host, or mooncake refuses to start.
    """
    with _opening:
        key = (address, protocol, device)
        if key not in _opened:
            with quietly(_logger):
                engine = _load_engine()
                _check_address(address)
                code = engine.initialize(address, "P2PHANDSHAKE", protocol, device)
                if code != 0:
                    value = f"{protocol} at {address}, device {device or 'any'}"
                    raise EndpointFailed("starting", value, f"code {code}")
                _opened[key] = Endpoint(engine, address, protocol)
    yield _opened[key]


@contextmanager
def open_endpoint_if_any(options: P2pOptions | None, bus_url: str) -> Iterator[Endpoint | None]:
    """The endpoint that `options` ask for; None: none is wanted, or none is to be had.

    Raises:
        EndpointUnavailable, EndpointFailed, HostUnknown: it is required.
    """
    endpoint = None
    with ExitStack() as stack:
        if options is not None:
            try:
                address = options.address or address_towards(bus_url)
                opened = open_endpoint(address, options.protocol, options.device)
                endpoint = stack.enter_context(opened)
            except (EndpointUnavailable, EndpointFailed, HostUnknown) as error:
                if options.required:
                    raise
                _logger.warning("nothing is offered to, or read from, other hosts: %s", error)
        yield endpoint


def register_block(endpoint: Endpoint, block: SharedBlock) -> None:
    """Let peers read a block, its header with it.

    Raises:
        EndpointFailed
    """
    endpoint.register(block.address - SHM_HEADER_BYTES, SHM_HEADER_BYTES + block.size_bytes)


def unregister_block(endpoint: Endpoint, block: SharedBlock) -> None:
    """To be called before the block is closed.

    Raises:
        EndpointFailed: it was not registered.
    """
    endpoint.unregister(block.address - SHM_HEADER_BYTES)


def _load_engine() -> Any:
    """A new, idle transfer engine."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("mooncake.engine").TransferEngine()
    except ModuleNotFoundError as error:
        raise EndpointUnavailable(
            f"the package {error.name} is not installed",
            "pip install 'weightbus[p2p]', or 'weightbus[p2p-cpu]' where there is no CUDA",
        ) from error
    except (ImportError, OSError) as error:
        missing = [name for name in _LIBRARIES if not _is_loadable(name)]
        if not missing:
            raise EndpointUnavailable(str(error), "see what the message names") from error
        packages = " ".join(_LIBRARIES[name] for name in missing)
        raise EndpointUnavailable(
            f"mooncake needs {', '.join(missing)}", f"apt-get install {packages}"
        ) from error


def _is_loadable(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _check_address(address: str) -> None:
    """mooncake would offer an address under which nobody reaches it."""
    if reason := why_not_own_address(address):
        raise EndpointFailed(
            "starting", f"address {address!r}", f"must be one of this host: {reason}"
        )
