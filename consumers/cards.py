"""The network cards of this host. Reads /sys and the addresses of cards; sends nothing.

A card is a piece of hardware, or a bond, which stands for those that it joins. What is only made of
software (a bridge, a tunnel, a container's end of a pair) has a speed that means nothing; it counts
as the card that it lies on, if there is one.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from ipaddress import ip_address
from pathlib import Path
from typing import Final

__all__ = ("card_holding", "network_cards")

_CARDS: Final = Path("/sys/class/net")
_ADDRESSES_6: Final = Path("/proc/net/if_inet6")
_BYTES_PER_MEGABIT: Final = 125_000

_SIOCGIFADDR: Final = 0x8915
"""<linux/sockios.h>: the address of an interface; `struct ifreq` has its name in 16 bytes, then a
`sockaddr_in`, whose address begins at byte 20."""

_MAX_LAYERS: Final = 4
"""Such as a VLAN over a bridge over a bond."""


def network_cards(directory: Path = _CARDS, only: str | None = None) -> tuple[int, int]:
    """(Bytes per second of one, how many) of the fastest cards that are up; (0, 1): the system does
    not say.

    Args:
        only: the interface whose card counts alone; its card is looked for below it.
    """
    names = sorted(card.name for card in directory.iterdir()) if directory.is_dir() else []
    if only is not None:
        names = _below(directory, only, _MAX_LAYERS)[:1]
    speeds = [speed for name in names if (speed := _speed(directory / name))]
    return (max(speeds), speeds.count(max(speeds))) if speeds else (0, 1)


def card_holding(address: str) -> str | None:
    """Name of the interface that has an address, of either family; None: none of this host has."""
    try:
        family, *_, where = socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM)[0]
        wanted = ip_address(str(where[0]).partition("%")[0])
    except (OSError, ValueError):
        return None
    if family == socket.AF_INET6:
        return _holding_6(wanted.packed.hex())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it has none
                continue
            if answer[20:24] == wanted.packed:
                return name
    return None


def _holding_6(wanted: str) -> str | None:
    try:
        lines = _ADDRESSES_6.read_text("ascii").splitlines()
    except OSError:
        return None
    return next((line.split()[-1] for line in lines if line.startswith(wanted)), None)


def _below(directory: Path, name: str, layers: int) -> list[str]:
    """The cards that an interface is, or lies on."""
    if _is_card(directory / name) or not layers:
        return [name]
    lower = sorted(path.name[6:] for path in (directory / name).glob("lower_*"))
    return [card for below in lower for card in _below(directory, below, layers - 1)]


def _is_card(card: Path) -> bool:
    """Hardware that is not part of a bond, or a bond."""
    hardware = (card / "device").exists() and not (card / "bonding_slave").exists()
    return hardware or (card / "bonding").exists()


def _speed(card: Path) -> int:
    """Bytes per second; 0: it is no card, is down, or does not say."""
    try:
        megabits = int((card / "speed").read_text("ascii"))
        up = (card / "operstate").read_text("ascii").strip() == "up"
    except (OSError, ValueError):
        return 0
    return megabits * _BYTES_PER_MEGABIT if up and megabits > 0 and _is_card(card) else 0
