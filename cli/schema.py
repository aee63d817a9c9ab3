"""`weightbus schema`: the contract as a document, for readers in any language."""

from __future__ import annotations

import json

import click

from weightbus.schemas.asyncapi import asyncapi_document
from weightbus.schemas.jsonschema import json_schema

__all__ = ("command",)


@click.command("schema")
@click.option(
    "--format",
    "document_format",
    type=click.Choice(["json-schema", "asyncapi"]),
    default="json-schema",
    show_default=True,
    help="JSON Schema of every message, or AsyncAPI 3: which message goes where.",
)
@click.option(
    "--prefix",
    default="weightbus",
    show_default=True,
    envvar="WEIGHTBUS_PREFIX",
    help="First token of every subject.",
)
def command(document_format: str, prefix: str) -> None:
    """Print the contract as JSON Schema or AsyncAPI."""
    document = asyncapi_document(prefix) if document_format == "asyncapi" else json_schema()
    click.echo(json.dumps(document, indent=2))
