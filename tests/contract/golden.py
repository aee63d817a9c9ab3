"""Where the golden files lie and what they must hold. Reads and writes only `golden/`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.contract.examples import EXAMPLES, LAYOUT, NEEDS, VARIANTS
from weightbus.schemas import CONTENT_TYPE_JSON, CONTENT_TYPE_MSGPACK, encode
from weightbus.schemas.blobs import canonical

__all__ = ("GOLDEN", "SUFFIXES", "expected_files")

GOLDEN: Final = Path(__file__).parent / "golden"

SUFFIXES: Final = {CONTENT_TYPE_MSGPACK: "msgpack", CONTENT_TYPE_JSON: "json"}


def expected_files() -> dict[str, bytes]:
    """File name -> content, of every message in both encodings, and of the two stored objects.

    The objects are given as the canonical bytes that are hashed, before compression.
    """
    files = {
        f"{name}.{suffix}": encode(message, content_type)
        for name, message in (EXAMPLES | VARIANTS).items()
        for content_type, suffix in SUFFIXES.items()
    }
    files["Layout.msgpack"] = canonical("layout", LAYOUT)
    files["Needs.msgpack"] = canonical("needs", NEEDS)
    return files
