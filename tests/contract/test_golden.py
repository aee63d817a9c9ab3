"""Golden bytes: what was once said is still said, and still understood."""

from __future__ import annotations

import msgspec
import pytest

from tests.contract.examples import EXAMPLES, LAYOUT, NEEDS, VARIANTS
from tests.contract.golden import GOLDEN, SUFFIXES, expected_files
from weightbus.schemas import (
    Message,
    decode,
    decode_layout,
    decode_needs,
    encode_layout,
    encode_needs,
    layout_digest,
    needs_digest,
)
from weightbus.schemas.blobs import compress
from weightbus.schemas.jsonschema import message_types

MESSAGES = [pytest.param(message, id=name) for name, message in EXAMPLES.items()]
NAMED = [pytest.param(name, message, id=name) for name, message in (EXAMPLES | VARIANTS).items()]


def test_examples_cover_every_message_of_the_contract() -> None:
    assert {message.__name__ for message in message_types()} == set(EXAMPLES)


@pytest.mark.parametrize("message", MESSAGES)
def test_example_shows_every_field(message: Message) -> None:
    """A field left at its default would not be pinned by its golden bytes."""
    defaults = {
        field.name: field.default
        for field in msgspec.structs.fields(message)
        if field.default is not msgspec.NODEFAULT and field.name != "schema_version"
    }
    unset = {name for name, default in defaults.items() if getattr(message, name) == default}
    assert unset <= ALLOWED_DEFAULTS.get(type(message).__name__, set())


ALLOWED_DEFAULTS = {
    "CheckpointReady": {"files"},
    "UpdateFailed": {"served_version"},
    "Described": {"untraced_reason"},
    "Applied": {"processed_parameters", "reason"},
}
"""What excludes another field, or says that there is nothing to say."""


def test_golden_files_are_exactly_those_expected() -> None:
    found = {path.name for path in GOLDEN.iterdir()}
    assert found == set(expected_files())


@pytest.mark.parametrize(("name", "content"), list(expected_files().items()))
def test_encoding_yields_the_golden_bytes(name: str, content: bytes) -> None:
    assert content == (GOLDEN / name).read_bytes(), "see tests/contract/examples.py"


@pytest.mark.parametrize("content_type", SUFFIXES)
@pytest.mark.parametrize(("name", "message"), NAMED)
def test_golden_bytes_decode_to_the_example(name: str, message: Message, content_type: str) -> None:
    path = GOLDEN / f"{name}.{SUFFIXES[content_type]}"
    assert decode(path.read_bytes(), content_type, type(message)) == message


def test_layout_digest_is_stable() -> None:
    assert layout_digest(LAYOUT) == LAYOUT_DIGEST
    assert decode_layout(encode_layout(LAYOUT)) == LAYOUT
    assert decode_layout(compress((GOLDEN / "Layout.msgpack").read_bytes())) == LAYOUT


def test_needs_digest_is_stable() -> None:
    assert needs_digest(NEEDS) == NEEDS_DIGEST
    assert decode_needs(encode_needs(NEEDS)) == NEEDS
    assert decode_needs(compress((GOLDEN / "Needs.msgpack").read_bytes())) == NEEDS


LAYOUT_DIGEST = "cd8fb43b258e4cade120d90610f6c9285d102f622a10f7304d76b82dd7fa4ce5"
NEEDS_DIGEST = "d6b64f60c1ecf354560771f5e5b85e9ff354ab0e2bda4d1b6d1392188cd1191b"
