"""What the commands that only look on have in common."""

from __future__ import annotations

import os
import sys

import click
from msgspec import structs

from weightbus.bus.settings import BusSettings

__all__ = ("close_broken_pipe", "running_bus")


def running_bus(nats_url: str | None, name: str) -> BusSettings:
    """Settings to reach the bus of `--nats` or the environment; one of our own would be empty.

    Raises:
        click.UsageError: neither names a bus.
        SettingInvalid: a variable's value cannot be used.
    """
    settings = BusSettings.from_env(os.environ)
    url = nats_url or settings.url
    if url is None:
        raise click.UsageError("give --nats URL, or set WEIGHTBUS_NATS_URL: which bus to look at")
    return structs.replace(settings, url=url, name=name)


def close_broken_pipe() -> None:
    """Whoever read our output has gone: let the interpreter end without complaining about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
