"""What a peer of a newer minor version would say: our message, with more in it. Does no I/O."""

from __future__ import annotations

from typing import Any

from msgspec import inspect

__all__ = ("with_news",)

ADDED_LATER = {"deep": [1, None, {"x": "y"}]}


def with_news(message_type: type, document: Any) -> Any:
    """`document` (untyped) with an unknown field in every struct, however deep it lies.

    Of structs that are arrays it is one more element at the end.
    """
    return _add(inspect.type_info(message_type), document)


def _add(of: inspect.Type, value: Any) -> Any:
    if isinstance(of, inspect.Metadata):
        return _add(of.type, value)
    if isinstance(of, inspect.UnionType):
        return _add(_chosen(of.types, value), value)
    if isinstance(of, inspect.StructType) and of.array_like:
        fields = zip(of.fields, value, strict=True)
        return [*(_add(field.type, item) for field, item in fields), ADDED_LATER]
    if isinstance(of, inspect.StructType):
        types = {field.encode_name: field.type for field in of.fields}
        more = {name: _add(types[name], item) for name, item in value.items() if name in types}
        return value | more | {"added_later": ADDED_LATER}
    if isinstance(of, inspect.CollectionType):
        return [_add(of.item_type, item) for item in value]
    if isinstance(of, inspect.TupleType):
        return [_add(one, item) for one, item in zip(of.item_types, value, strict=True)]
    if isinstance(of, inspect.DictType):
        return {key: _add(of.value_type, item) for key, item in value.items()}
    return value


def _chosen(types: tuple[inspect.Type, ...], value: Any) -> inspect.Type:
    """The type of a union that a value is of; any, where it is no struct."""
    for of in types:
        is_struct = isinstance(of, inspect.StructType)
        if isinstance(value, dict) and is_struct and value.get(of.tag_field) == of.tag:  # type: ignore[attr-defined]
            return of
    return inspect.AnyType()
