"""The demo's engines put sockets below their directory."""

from tests.engine_paths import short_path

__all__ = ("short_path",)
