"""The contract as JSON Schema (draft 2020-12), derived from the structs. Does no I/O but `inspect`.

The schema says what fields and types are allowed in both encodings (bytes are base64 text in JSON).
Rules between fields are told in the descriptions and checked by `weightbus.schemas.rules`.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from textwrap import dedent
from typing import Any, Final

import msgspec

from weightbus.schemas.base import SCHEMA_VERSION, Message
from weightbus.schemas.catalogue import BUCKETS, CATALOGUE, PARAMETERS, WORKER_MESSAGES
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs

__all__ = ("DIALECT", "json_schema", "message_types", "struct_schemas")

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

OBJECTS: Final[tuple[type[msgspec.Struct], ...]] = (Layout, Needs)
"""What the object store holds; not messages."""


def message_types() -> tuple[type[Message], ...]:
    """Every message: of subjects, of buckets, and between consumer and worker."""
    entries = (*CATALOGUE, *BUCKETS)
    return tuple(entry.message for entry in entries) + WORKER_MESSAGES


def json_schema() -> dict[str, Any]:
    """One document: any message of the catalogue, and in `$defs` every struct by name."""
    return {
        "$schema": DIALECT,
        "title": "Weight bus messages",
        "description": f"Any message of major version {SCHEMA_VERSION} of the contract.",
        "oneOf": [{"$ref": f"#/$defs/{message.__name__}"} for message in message_types()],
        "$defs": struct_schemas("#/$defs/{name}"),
    }


def struct_schemas(ref_template: str) -> dict[str, Any]:
    """Struct name -> schema, of every message, `Layout`, `Needs` and all that they hold.

    `ref_template` is how one refers to another, such as `#/$defs/{name}`.
    """
    types = (*message_types(), *OBJECTS)
    _, schemas = msgspec.json.schema_components(types, ref_template=ref_template)
    structs: dict[str, type[msgspec.Struct]] = {}
    for info in msgspec.inspect.multi_type_info(types):
        _collect(info, structs)
    for name, schema in schemas.items():
        _describe(schema, structs[name])
    return {name: _portable(schemas[name]) for name in sorted(schemas)}


def _collect(info: Any, structs: dict[str, type[msgspec.Struct]]) -> None:
    """Every struct that a type mentions, by name."""
    inner: tuple[Any, ...] = ()
    match info:
        case msgspec.inspect.StructType() if info.cls.__name__ not in structs:
            structs[info.cls.__name__] = info.cls
            inner = tuple(field.type for field in info.fields)
        case msgspec.inspect.Metadata():
            inner = (info.type,)
        case msgspec.inspect.CollectionType():
            inner = (info.item_type,)
        case msgspec.inspect.TupleType():
            inner = info.item_types
        case msgspec.inspect.DictType():
            inner = (info.key_type, info.value_type)
        case msgspec.inspect.UnionType():
            inner = info.types
    for one in inner:
        _collect(one, structs)


def _describe(schema: dict[str, Any], struct: type[msgspec.Struct]) -> None:
    """The struct's docstring and those under its fields, as descriptions."""
    if struct.__doc__:
        schema["description"] = inspect.cleandoc(struct.__doc__)
    docs: dict[str, str] = dict(PARAMETERS) if issubclass(struct, Message) else {}
    for base in reversed(struct.__mro__):
        if issubclass(base, msgspec.Struct) and base is not msgspec.Struct:
            docs |= _field_docstrings(base)
    for name, field in schema.get("properties", {}).items():
        if name in docs:
            field["description"] = docs[name]
    for name, field in zip(struct.__struct_fields__, schema.get("prefixItems", ()), strict=False):
        field["title"] = name
        if name in docs:
            field["description"] = docs[name]


def _field_docstrings(struct: type[msgspec.Struct]) -> Mapping[str, str]:
    """Field -> the string that follows its annotation in the source."""
    body = ast.parse(dedent(inspect.getsource(struct))).body[0]
    docs: dict[str, str] = {}
    field = ""
    for node in body.body if isinstance(body, ast.ClassDef) else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            field = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and field:
            docs[field] = inspect.cleandoc(str(node.value.value))
            field = ""
    return docs


def _portable(schema: Any) -> Any:
    """As JSON Schema has it: lists for tuples, `$` for the `\\Z` of Python's regular expressions,
    and no `discriminator`, which is OpenAPI's: every struct of a union requires its own tag."""
    if isinstance(schema, dict):
        return {
            key: value.replace(r"\Z", "$") if key == "pattern" else _portable(value)
            for key, value in schema.items()
            if key != "discriminator"
        }
    if isinstance(schema, list | tuple):
        return [_portable(value) for value in schema]
    return schema
