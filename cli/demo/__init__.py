"""`weightbus demo`: train, publish and follow a few versions on this machine, and verify each."""

from __future__ import annotations

from weightbus.cli.demo.command import command

__all__ = ("command",)
