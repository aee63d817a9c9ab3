"""The JSON Schema and the AsyncAPI document say what the codec does.

No schema of AsyncAPI 3 itself is at hand offline; its structure is checked here by its rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from jsonschema.protocols import Validator

from tests.contract.examples import EXAMPLES, LAYOUT, NEEDS
from tests.contract.tables import HEARD, SAID
from weightbus.schemas import (
    BUCKETS,
    CATALOGUE,
    CONTENT_TYPE_JSON,
    CheckpointReady,
    MessageInvalid,
    decode,
)
from weightbus.schemas.asyncapi import asyncapi_document
from weightbus.schemas.jsonschema import DIALECT, json_schema

SCHEMA = json_schema()
ASYNCAPI = asyncapi_document()
GUIDE = (Path(__file__).parents[2] / "docs" / "messages.md").read_text()
ENTRIES = [pytest.param(entry, id=entry.message.__name__) for entry in (*CATALOGUE, *BUCKETS)]


def validator(name: str) -> Validator:
    """Of one struct of the JSON Schema."""
    return Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]})


def plain(value: Any) -> Any:
    return json.loads(msgspec.json.encode(value))


def references(document: Any) -> Iterator[str]:
    if isinstance(document, dict):
        for key, value in document.items():
            if key == "$ref":
                yield value
            yield from references(value)
    elif isinstance(document, list):
        for value in document:
            yield from references(value)


def resolve(document: Any, reference: str) -> Any:
    assert reference.startswith("#/"), reference
    for step in reference[2:].split("/"):
        document = document[step]
    return document


def test_json_schema_is_valid() -> None:
    assert SCHEMA["$schema"] == DIALECT
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("document", [SCHEMA, ASYNCAPI], ids=["json-schema", "asyncapi"])
def test_every_reference_resolves(document: dict[str, Any]) -> None:
    found = set(references(document))
    assert found
    for reference in found:
        assert resolve(document, reference) is not None


@pytest.mark.parametrize("document", [SCHEMA, ASYNCAPI], ids=["json-schema", "asyncapi"])
def test_document_is_plain_json(document: dict[str, Any]) -> None:
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert r"\\Z" not in json.dumps(document), "a pattern of Python, not of ECMA-262"
    assert "discriminator" not in json.dumps(document), "OpenAPI's, and an object only there"


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_keeps_the_schema(name: str) -> None:
    document = plain(EXAMPLES[name])
    validator(name).validate(document)
    Draft202012Validator(SCHEMA).validate(document)


@pytest.mark.parametrize("name", EXAMPLES)
def test_schema_refuses_what_the_codec_refuses(name: str) -> None:
    document = plain(EXAMPLES[name])
    check = validator(name)
    assert not check.is_valid(document | {"schema_version": 0})
    assert not check.is_valid(document | {"type": "Other"})
    for field in SCHEMA["$defs"][name]["required"]:
        assert not check.is_valid({key: document[key] for key in document if key != field})
        assert not check.is_valid(document | {field: {"unheard": "of"}})
    assert check.is_valid(document | {"added_later": 1})


def test_stored_objects_keep_the_schema() -> None:
    validator("Layout").validate(plain(LAYOUT))
    validator("Needs").validate(plain(NEEDS))
    broken = plain(LAYOUT)
    broken[1][0][4] = -1
    assert not validator("Layout").is_valid(broken)


def test_token_pattern_means_the_same_as_in_the_codec() -> None:
    pattern = SCHEMA["$defs"]["Join"]["properties"]["model"]["pattern"]
    assert re.search(pattern, "qwen3-rl")
    assert not re.search(pattern, "a.b")


def test_every_field_of_what_other_languages_say_and_read_is_described() -> None:
    for kind in (*SAID, *HEARD):
        schema = SCHEMA["$defs"][kind.__name__]
        for name, field in schema["properties"].items():
            assert name == "type" or field.get("description"), (kind, name)
    assert SCHEMA["$defs"]["Join"]["properties"]["model"]["description"].startswith("A name that")


def test_fields_are_described_by_the_docstrings_of_the_structs() -> None:
    ready = SCHEMA["$defs"]["CheckpointReady"]
    assert ready["description"].startswith("One version of a model's weights can be read.")
    files = ready["properties"]["files"]["description"]
    assert files == "Absolute paths of safetensors files, as the readers see them."
    version = ready["properties"]["schema_version"]["description"]
    assert version.startswith("Major version of the contract")
    shard = SCHEMA["$defs"]["ShardSpec"]["prefixItems"]
    assert [item["title"] for item in shard] == [
        "tensor",
        "starts",
        "sizes",
        "segment",
        "offset_bytes",
    ]


def test_asyncapi_has_what_its_version_requires() -> None:
    assert ASYNCAPI["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= set(ASYNCAPI["info"])
    assert set(ASYNCAPI) <= {
        "asyncapi",
        "info",
        "defaultContentType",
        "channels",
        "operations",
        "components",
    }
    for name in (*ASYNCAPI["components"]["messages"], *ASYNCAPI["components"]["schemas"]):
        assert re.fullmatch(r"[\w.-]+", name)
    for operation in ASYNCAPI["operations"].values():
        assert operation["action"] in ("send", "receive")


def test_asyncapi_channels_declare_the_parameters_of_their_address() -> None:
    addresses = [channel["address"] for channel in ASYNCAPI["channels"].values()]
    assert len(set(addresses)) == len(addresses)
    for channel in ASYNCAPI["channels"].values():
        assert set(re.findall(r"\{(\w+)\}", channel["address"])) == set(channel["parameters"])
        assert channel["messages"]


def test_asyncapi_operations_use_messages_of_their_own_channel() -> None:
    for operation in ASYNCAPI["operations"].values():
        channel = operation["channel"]["$ref"]
        for message in operation["messages"]:
            assert message["$ref"].startswith(f"{channel}/messages/")


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry_of_the_catalogue_appears_in_asyncapi(entry: Any) -> None:
    name = entry.message.__name__
    message = ASYNCAPI["components"]["messages"][name]
    assert resolve(ASYNCAPI, message["payload"]["$ref"])["title"] == name
    for action, roles in (("send", (entry.sender,)), ("receive", entry.receivers)):
        operation = ASYNCAPI["operations"][f"{action}{name}"]
        assert {tag["name"] for tag in operation["tags"]} == set(roles)
        channel = resolve(ASYNCAPI, operation["channel"]["$ref"])
        assert name in channel["messages"]
        template = entry.subject if hasattr(entry, "subject") else entry.key
        assert channel["address"].endswith(template.replace("{p}.", ""))


def test_asyncapi_schemas_are_those_of_the_json_schema() -> None:
    schemas = ASYNCAPI["components"]["schemas"]
    moved = json.loads(json.dumps(schemas).replace("#/components/schemas/", "#/$defs/"))
    assert moved == SCHEMA["$defs"]


def test_asyncapi_is_for_the_given_prefix() -> None:
    channels = asyncapi_document("lab")["channels"]
    assert channels["update"]["address"] == "lab.{model}.update.{engine}"
    assert channels["presence"]["address"] == "$KV.lab-presence.{model}.{engine}"
    with pytest.raises(MessageInvalid):
        asyncapi_document("a.b")


@pytest.mark.parametrize("entry", ENTRIES)
def test_asyncapi_names_the_encoding_of_every_message(entry: Any) -> None:
    message = ASYNCAPI["components"]["messages"][entry.message.__name__]
    kind = getattr(entry, "encoding", "msgpack")
    assert message["contentType"] == f"application/{kind}"


@pytest.mark.parametrize("entry", ENTRIES)
def test_guide_shows_where_every_message_goes(entry: Any) -> None:
    place = (
        (entry.subject, entry.stream) if hasattr(entry, "subject") else (entry.key, entry.bucket)
    )
    row = f"| `{entry.message.__name__}` | `{place[0]}` | {place[1]} | {entry.sender} | "
    assert row + ", ".join(entry.receivers) + " |" in GUIDE


def test_guide_s_example_is_a_message() -> None:
    example = GUIDE.partition("```json\n")[2].partition("```")[0].encode()
    ready = decode(example, CONTENT_TYPE_JSON, CheckpointReady)
    assert len(ready.files) == 2
    validator("CheckpointReady").validate(json.loads(example))
