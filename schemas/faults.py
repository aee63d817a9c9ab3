"""Turns what msgspec raises into `MessageInvalid`: real field path, value found there, limit.

Does no I/O. msgspec names a place by its position (`$[0][3][2]`) and leaves the value out; here the
path is walked again beside the type and the untyped document. This runs only when something failed,
and reads the document again only if that is cheap (`MAX_REREAD_BYTES`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final

import msgspec
from msgspec import inspect

from weightbus.schemas.errors import MessageInvalid

__all__ = ("DECODE_ERRORS", "ENCODE_ERRORS", "fault_of", "reread")

DECODE_ERRORS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""All that msgspec's decoders raise for bad input."""

ENCODE_ERRORS: Final = (TypeError, ValueError, OverflowError, RecursionError)
"""All that msgspec's encoders raise for a struct whose fields are not what they are declared to."""

MAX_REREAD_BYTES = 2**20
"""Larger payloads are not decoded a second time for the sake of an error's text."""

NOT_READ: Final = object()
"""Stands for a document or a value that cannot be shown."""

_STEP = re.compile(r"\.([A-Za-z_]\w*)|\[(\d{1,9})\]|(\[\.\.\.\])")
_MISSING = re.compile(r"^Object missing required field `(\w+)`$")


def reread(payload: bytes, decode: Callable[[bytes], Any]) -> Any:
    """The untyped document, or `NOT_READ` if it cannot be had cheaply."""
    if len(payload) > MAX_REREAD_BYTES:
        return NOT_READ
    try:
        return decode(payload)
    except DECODE_ERRORS:
        return NOT_READ


def fault_of(kind: str, error: Exception, expected: Any, document: Any) -> MessageInvalid:
    """What a decoder said about `document` (from `reread`), in our words.

    `expected` is the type it was asked for.
    """
    if isinstance(error, RecursionError):
        return MessageInvalid(kind, "$", "a document nested too deep", "at most 500 levels deep")
    if not isinstance(error, msgspec.ValidationError):
        return MessageInvalid(kind, "$", "not readable", str(error))
    rule, _, place = str(error).rpartition(" - at ")
    if not rule:
        rule, place = str(error), "`$`"
    in_key = place.startswith("`key` in ")
    path, value, types = _walk(place.removeprefix("`key` in ").strip("`"), expected, document)
    missing = _MISSING.match(rule)
    if missing:
        name = missing[1]
        return MessageInvalid(
            kind, name if path == "$" else f"{path}.{name}", "missing", "required"
        )
    field = f"{path} (a key)" if in_key else path
    shown = "not shown" if value is NOT_READ else value
    return MessageInvalid(kind, field, shown, _limit(rule, types))


def _walk(place: str, expected: Any, document: Any) -> tuple[str, Any, tuple[inspect.Type, ...]]:
    """Path in field names, value there, and the types that were allowed there."""
    types = _alternatives(_type_info(expected))
    path, value = "", document
    for name, index, any_key in _STEP.findall(place):
        types = tuple(_narrow(types, value, name))
        if name:
            path += f".{name}"
            value = value.get(name, NOT_READ) if isinstance(value, dict) else NOT_READ
            types = _field_types(types, name)
        elif index:
            label = _field_name(types, int(index))
            path += f".{label}" if label else f"[{index}]"
            within = isinstance(value, list) and int(index) < len(value)
            value = value[int(index)] if within else NOT_READ
            types = _field_types(types, label) if label else _item_types(types, int(index))
        elif any_key:
            path += any_key
            types = tuple(
                t
                for d in types
                if isinstance(d, inspect.DictType)
                for t in _alternatives(d.value_type)
            )
    return path.removeprefix(".") or "$", value, types


@lru_cache(maxsize=128)
def _type_info(expected: Any) -> inspect.Type:
    return inspect.type_info(expected)


def _alternatives(of: inspect.Type) -> tuple[inspect.Type, ...]:
    if isinstance(of, inspect.Metadata):
        return _alternatives(of.type)
    if isinstance(of, inspect.UnionType):
        return tuple(one for part in of.types for one in _alternatives(part))
    return (of,)


def _narrow(types: Iterable[inspect.Type], value: Any, step: str) -> Iterable[inspect.Type]:
    """Of several tagged structs, the one whose tag the value carries; all if that is the step."""
    for of in types:
        if isinstance(of, inspect.StructType) and isinstance(value, dict) and of.tag_field != step:
            tag = of.tag if of.tag_field is None else value.get(of.tag_field, of.tag)
            if tag != of.tag:
                continue
        yield of


def _field_name(types: Iterable[inspect.Type], index: int) -> str:
    """Name of the field at a position of an array-like struct; empty for an array."""
    for of in types:
        if isinstance(of, inspect.StructType) and of.array_like and index < len(of.fields):
            return of.fields[index].name
    return ""


def _field_types(types: Iterable[inspect.Type], name: str) -> tuple[inspect.Type, ...]:
    found: list[inspect.Type] = []
    for of in types:
        if not isinstance(of, inspect.StructType):
            continue
        if name == of.tag_field:
            found.append(inspect.LiteralType((of.tag,)))
        found += [t for f in of.fields if f.name == name for t in _alternatives(f.type)]
    return tuple(found)


def _item_types(types: Iterable[inspect.Type], index: int) -> tuple[inspect.Type, ...]:
    found: list[inspect.Type] = []
    for of in types:
        if isinstance(of, inspect.CollectionType):
            found += _alternatives(of.item_type)
        elif isinstance(of, inspect.TupleType) and index < len(of.item_types):
            found += _alternatives(of.item_types[index])
    return tuple(found)


def _limit(rule: str, types: Iterable[inspect.Type]) -> str:
    if rule.startswith(("Invalid enum value", "Invalid value")):
        allowed = [str(v) for of in types if isinstance(of, inspect.LiteralType) for v in of.values]
        return "must be " + " or ".join(allowed) if allowed else "must be a known value"
    if rule.startswith("Expected "):
        return "must be " + rule.removeprefix("Expected ").partition(", got ")[0].replace("`", "")
    return rule
