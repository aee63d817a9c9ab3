"""The file that holds the rates of this host: `weightbus doctor` writes it, consumers read it."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from weightbus.consumers.planning.host_links import HostLinks
from weightbus.schemas.rounds import Links

__all__ = ("LINKS_FILE", "links_file", "read_links")

LINKS_FILE = "~/.config/weightbus/links.json"
"""Where a consumer looks for it, as people write it."""


def links_file() -> Path:
    """`LINKS_FILE`, or what XDG_CONFIG_HOME makes of it; it need not exist."""
    return Path(click.get_app_dir("weightbus")) / "links.json"


def read_links(path: Path | None) -> Links:
    """What a file says; None: what `LINKS_FILE` says, if it exists.

    Raises:
        BadParameter: it is not what it must be.
    """
    if path is None:
        path = links_file()
        if not path.is_file():
            return Links()
    try:
        return msgspec.json.decode(path.read_bytes(), type=HostLinks).links
    except (OSError, msgspec.MsgspecError) as error:
        reason = f"{path} holds no rates of a host: {error}"
        raise click.BadParameter(reason, param_hint="--links") from None
