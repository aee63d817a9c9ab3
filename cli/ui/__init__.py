"""`weightbus ui`: the fleet, its rounds and their waterfalls as a web page."""

from weightbus.cli.ui.command import command

__all__ = ("command",)
