"""Options that several commands have, with the same names, defaults and environment variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from weightbus.bus.endpoint import PROTOCOLS

__all__ = ("p2p_options",)

F = TypeVar("F", bound=Callable[..., Any])


def p2p_options(command: F) -> F:
    """`--p2p-protocol` and `--p2p-device`: how the transfer engine is opened."""
    protocol = click.option(
        "--p2p-protocol",
        type=click.Choice(PROTOCOLS),
        default="tcp",
        envvar="WEIGHTBUS_P2P_PROTOCOL",
        show_default=True,
        help="Of the transfer engine.",
    )
    device = click.option(
        "--p2p-device",
        default="",
        envvar="WEIGHTBUS_P2P_DEVICE",
        help="Network card of the transfer engine, such as mlx5_0.  [default: its choice]",
    )
    return protocol(device(command))
