"""Options that several commands have, with the same names, defaults and environment variables."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from weightbus.bus.endpoint import PROTOCOLS
from weightbus.consumers.engines.torch.spec import DEVICE_PATTERN

__all__ = ("device_option", "p2p_options")

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


def device_option(command: F) -> F:
    """`--device`: where the parameters of an engine that is started are."""
    option = click.option(
        "--device",
        default="cpu",
        show_default=True,
        metavar="cpu|cuda|cuda:N",
        callback=_device,
        help="Where its parameters are; with cuda:N rank r has GPU N + r.",
    )
    return option(command)


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not re.search(DEVICE_PATTERN, value):
        raise click.BadParameter(f"{value!r} must be cpu, cuda, or cuda: and a number")
    return value
