"""The contract as an AsyncAPI 3 document, derived from the catalogue. Does no I/O.

Every subject is a channel; so is every bucket's key, which NATS keeps under `$KV.`. Operations are
named for the message and tagged with the parts of Weight bus that take part in them.
"""

from __future__ import annotations

import re
from typing import Any, Final

from weightbus.schemas.base import SCHEMA_VERSION
from weightbus.schemas.catalogue import (
    BUCKETS,
    CATALOGUE,
    PARAMETERS,
    STREAMS,
    BucketEntry,
    Entry,
    bucket_name,
    check_prefix,
    stream_name,
)
from weightbus.schemas.codec import CONTENT_TYPE_JSON, CONTENT_TYPE_MSGPACK
from weightbus.schemas.jsonschema import struct_schemas

__all__ = ("ASYNCAPI_VERSION", "HEADERS", "asyncapi_document")

ASYNCAPI_VERSION: Final = "3.0.0"

HEADERS: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "Content-Type": {
            "type": "string",
            "enum": [CONTENT_TYPE_MSGPACK, CONTENT_TYPE_JSON],
            "default": CONTENT_TYPE_MSGPACK,
            "description": "How the payload is encoded.",
        },
        "traceparent": {
            "type": "string",
            "description": "W3C trace context of the span that sent the message.",
        },
        "Nats-Msg-Id": {
            "type": "string",
            "description": "A stream drops a message whose id it has seen lately.",
        },
    },
}


def asyncapi_document(prefix: str = "weightbus") -> dict[str, Any]:
    """The document for subjects below `prefix`.

    Raises:
        MessageInvalid: `prefix` is not a subject token.
    """
    check_prefix(prefix)
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    for entry in (*CATALOGUE, *BUCKETS):
        address = _address(entry, prefix)
        channel = _channel_id(entry)
        found = channels.setdefault(channel, _channel(entry, address, prefix))
        name = entry.message.__name__
        found["messages"][name] = {"$ref": f"#/components/messages/{name}"}
        for action, roles in (("send", (entry.sender,)), ("receive", entry.receivers)):
            operations[f"{action}{name}"] = {
                "action": action,
                "channel": {"$ref": f"#/channels/{channel}"},
                "summary": entry.description,
                "tags": [{"name": role} for role in roles],
                "messages": [{"$ref": f"#/channels/{channel}/messages/{name}"}],
            }
    return {
        "asyncapi": ASYNCAPI_VERSION,
        "info": {
            "title": "Weight bus",
            "version": f"{SCHEMA_VERSION}.0.0",
            "description": "Freshly trained weights into running inference engines, as events.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": CONTENT_TYPE_MSGPACK,
        "channels": channels,
        "operations": operations,
        "components": {
            "messages": {
                entry.message.__name__: _message(entry) for entry in (*CATALOGUE, *BUCKETS)
            },
            "schemas": struct_schemas("#/components/schemas/{name}"),
        },
    }


def _address(entry: Entry | BucketEntry, prefix: str) -> str:
    if isinstance(entry, Entry):
        return entry.subject.replace("{p}", prefix)
    return f"$KV.{bucket_name(entry.bucket, prefix)}.{entry.key}"


def _channel_id(entry: Entry | BucketEntry) -> str:
    """Such as `round.plan`, `update` or `presence`: the constant tokens of the address."""
    if isinstance(entry, BucketEntry):
        return entry.bucket
    return ".".join(token for token in entry.subject.split(".") if not token.startswith("{"))


def _channel(entry: Entry | BucketEntry, address: str, prefix: str) -> dict[str, Any]:
    if isinstance(entry, Entry):
        stream = next(stream for stream in STREAMS if stream.name == entry.stream)
        kept = f"Stream {stream_name(stream.name, prefix)}. {stream.description}"
    else:
        kept = f"Key-value bucket {bucket_name(entry.bucket, prefix)}; keys expire."
    return {
        "address": address,
        "description": kept,
        "messages": {},
        "parameters": {
            name: {"description": PARAMETERS[name]} for name in re.findall(r"\{(\w+)\}", address)
        },
    }


def _message(entry: Entry | BucketEntry) -> dict[str, Any]:
    name = entry.message.__name__
    return {
        "name": name,
        "title": name,
        "summary": entry.description,
        "contentType": entry.content_type if isinstance(entry, Entry) else CONTENT_TYPE_MSGPACK,
        "headers": HEADERS,
        "payload": {"$ref": f"#/components/schemas/{name}"},
    }
