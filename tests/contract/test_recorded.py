"""What version 1.0 said is read by all later code, and means what it meant."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec import Struct, structs

from tests.contract.golden import SUFFIXES
from weightbus.schemas import (
    CONTENT_TYPE_MSGPACK,
    decode,
    decode_layout,
    decode_needs,
    layout_digest,
    needs_digest,
)
from weightbus.schemas.blobs import compress
from weightbus.schemas.jsonschema import message_types

RECORDED: Final = Path(__file__).parent / "recorded" / "1.0"
VALUES: Final[dict[str, Any]] = json.loads((RECORDED / "values.json").read_bytes())
TYPES: Final = {message.__name__: message for message in message_types()}
CONTENT_TYPES: Final = {f".{suffix}": content_type for content_type, suffix in SUFFIXES.items()}
OBJECTS: Final = ("Layout", "Needs")
FILES: Final = sorted(
    path
    for path in RECORDED.iterdir()
    if path.name not in ("values.json", "SHA256SUMS") and path.stem not in OBJECTS
)


def as_recorded(value: Any, recorded: Any) -> Any:
    """`value` as plain data, less the fields that were added after it was recorded."""
    if isinstance(value, Struct):
        names = structs.fields(value)
        if type(value).__struct_config__.array_like:
            short = zip(names, recorded, strict=False)
            return [as_recorded(getattr(value, field.name), item) for field, item in short]
        tag = {type(value).__struct_config__.tag_field: type(value).__struct_config__.tag}
        told = {field.encode_name: getattr(value, field.name) for field in names} | tag
        return {name: as_recorded(told[name], recorded[name]) for name in recorded if name in told}
    if isinstance(value, tuple):
        return [as_recorded(*pair) for pair in zip(value, recorded, strict=True)]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def test_nothing_recorded_was_changed_or_taken_away() -> None:
    sums = (RECORDED / "SHA256SUMS").read_text().splitlines()
    told = {name: digest for digest, name in (line.split("  ") for line in sums)}
    found = {path.name: path for path in RECORDED.iterdir() if path.name != "SHA256SUMS"}
    assert set(found) == set(told)
    for name, path in found.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == told[name], name


def test_every_message_of_1_0_is_recorded_whole_and_with_the_least() -> None:
    recorded = {path.name for path in FILES}
    names = {path.stem.partition("-")[0] for path in FILES}
    assert len(names) >= 31
    for name in names:
        for form in (name, f"{name}-least"):
            assert {f"{form}.json", f"{form}.msgpack"} <= recorded


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in FILES])
def test_recorded_message_is_read_and_means_what_it_meant(path: Path) -> None:
    message_type = TYPES[path.stem.partition("-")[0]]
    message = decode(path.read_bytes(), CONTENT_TYPES[path.suffix], message_type)
    assert as_recorded(message, VALUES[path.stem]) == VALUES[path.stem]


@pytest.mark.parametrize(
    ("name", "read", "digest_of"),
    [("Layout", decode_layout, layout_digest), ("Needs", decode_needs, needs_digest)],
)
def test_recorded_object_is_read_under_the_digest_it_had(
    name: str, read: Any, digest_of: Any
) -> None:
    canonical = (RECORDED / f"{name}.msgpack").read_bytes()
    thing = read(compress(canonical))
    assert as_recorded(thing, VALUES[name]) == VALUES[name]
    assert digest_of(thing) == hashlib.sha256(canonical).hexdigest()


def test_comparison_sees_a_value_that_means_something_else() -> None:
    path = RECORDED / "CheckpointSkipped.msgpack"
    message = decode(path.read_bytes(), CONTENT_TYPE_MSGPACK, TYPES["CheckpointSkipped"])
    recorded = VALUES["CheckpointSkipped"]
    for field, value in (("ranks", (2, 4)), ("cause", "busy"), ("waited_s", 0.0)):
        other = structs.replace(message, **{field: value})
        assert as_recorded(other, recorded) != recorded, field
