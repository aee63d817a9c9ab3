"""Which host this is, and how others reach it. Reads /proc and /dev/shm once each; sends nothing.

Who shares its memory has the same id.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from weightbus.bus.errors import BusUnavailable, HostUnknown

__all__ = (
    "address_towards",
    "host_id",
    "unknown_host",
    "why_not_own_address",
    "without_credentials",
)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SHARED_MEMORY = "/dev/shm"

NATS_PORT = 4222
"""Of a URL that names none."""


def host_id() -> str:
    """The kernel's boot id and the device number of /dev/shm.

    Two containers of one machine that do not share /dev/shm are two hosts.

    Raises:
        HostUnknown: the system does not tell.
    """
    try:
        boot_id = _BOOT_ID.read_text("ascii").strip()
        device = os.stat(_SHARED_MEMORY).st_dev
    except (OSError, UnicodeDecodeError) as error:
        raise HostUnknown(str(error)) from None
    return f"{boot_id}:{device:x}"


def address_towards(url: str) -> str:
    """The address of this host by which it reaches a NATS server; of several, the first.

    Others that reach the same server can mostly reach this host there, too. Resolves the server's
    name; no packet goes to the server.

    Raises:
        BusUnavailable: the server's name is not known.
        HostUnknown: the URL has no host, or there is no way to it.
    """
    first = url.split(",")[0]
    try:
        server = urlsplit(first if "//" in first else f"//{first}")
        if not server.hostname:
            raise ValueError("it names no host")
        kind, _, _, _, where = socket.getaddrinfo(
            server.hostname, server.port or NATS_PORT, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except socket.gaierror as error:
        raise BusUnavailable(without_credentials(url), unknown_host(first, error)) from None
    except (OSError, ValueError) as error:
        where_to = first.rpartition("@")[-1]  # credentials are nobody's business
        raise HostUnknown(f"no address of this host towards {where_to!r}: {error}") from error


def unknown_host(url: str, error: socket.gaierror) -> str:
    """Which name of a NATS URL is not known, and what the resolver says: why a bus is away."""
    hosts = dict.fromkeys(urlsplit(each).hostname or each for each in url.split(","))
    return f"host name {' or '.join(hosts)} is not known ({error.strerror})"


def without_credentials(url: str) -> str:
    """URLs may hold `user:password@`; error messages and logs must not."""
    return ",".join(
        f"{scheme}{sep}{rest.rpartition('@')[2]}" if sep else part.rpartition("@")[2]
        for part in url.split(",")
        for scheme, sep, rest in (part.partition("://"),)
    )


def why_not_own_address(address: str) -> str:
    """Why nothing can listen on an address of this host; empty: something can.

    Resolves a name.
    """
    try:
        kind, _, _, _, where = socket.getaddrinfo(address or "?", 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            probe.bind(where)
    except (OSError, UnicodeError) as error:
        return str(error)
    return ""
