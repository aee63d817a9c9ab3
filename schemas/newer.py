"""What a newer minor version of the contract may add beside unknown fields: kinds of ways.

Does no I/O. Fields are no matter here: every decoder ignores those that it does not know. A kind
of segment cannot be ignored by a decoder, since it is a value: a placement that offers a way of a
kind unknown here beside others is read as if it offered the others alone.
"""

from __future__ import annotations

from typing import Any, Final, get_args

from msgspec import Struct

from weightbus.schemas.placement import MAX_SEGMENT_WAYS, Segment

__all__ = ("KNOWN_KINDS", "without_unknown_ways")


def _kind_of(struct: type[Struct]) -> str:
    return str(struct.__struct_config__.tag)


KNOWN_KINDS: Final = tuple(_kind_of(struct) for struct in get_args(Segment))
"""Of segments, as the field `kind` names them."""

_FIELD: Final = "placement"


def without_unknown_ways(document: Any) -> Any:
    """`document` (untyped) less the ways whose kind is unknown; itself if there is none to leave.

    What breaks the contract of this version in any other respect stays as it is: more ways than are
    allowed, and a segment without any way of a kind known here. In errors about what is returned
    the ways of a segment are counted without those that were left out.
    """
    placement = document.get(_FIELD) if isinstance(document, dict) else None
    if not isinstance(placement, list):
        return document
    kept = [_known(ways) for ways in placement]
    if all(ours is ways for ours, ways in zip(kept, placement, strict=True)):
        return document
    return document | {_FIELD: kept}


def _known(ways: Any) -> Any:
    if not isinstance(ways, list) or len(ways) > MAX_SEGMENT_WAYS:
        return ways
    known = [way for way in ways if not _is_unknown(way)]
    return known if 0 < len(known) < len(ways) else ways


def _is_unknown(way: Any) -> bool:
    kind = way.get("kind") if isinstance(way, dict) else None
    return isinstance(kind, str) and kind not in KNOWN_KINDS
