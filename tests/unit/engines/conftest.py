"""Fixtures of the engines' tests."""

from tests.engine_paths import short_path

__all__ = ("short_path",)
