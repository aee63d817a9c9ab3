"""What a collector holds of one version, as a tree that keeps the rules of docs/telemetry.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.integration.tracing.collector import Collector
from weightbus.schemas.progress import FirstToken, StageComplete
from weightbus.tracing.attributes import ATTRIBUTES, SPANS, AttributeValue

__all__ = ("Node", "Tree", "tree_of")

WORDS: Final[dict[str, str]] = {info.name: info.word for info in SPANS}
PARENTS: Final[dict[str, str]] = {info.word: info.parent for info in SPANS}
KINDS: Final[dict[str, str]] = {info.word: f"SPAN_KIND_{info.kind}" for info in SPANS}
TYPES: Final = {
    "string": "string_value",
    "int": "int_value",
    "double": "double_value",
    "boolean": "bool_value",
}
ALLOWED: Final[dict[str, dict[str, str]]] = {
    info.word: {item.name: TYPES[item.type] for item in ATTRIBUTES if info.word in item.spans}
    for info in SPANS
}


@dataclass(frozen=True, kw_only=True)
class Node:
    """One span, as it was received."""

    service: str
    word: str
    """Its name's first word, or words."""
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    kind: str
    attributes: Mapping[str, AttributeValue]
    links: tuple[str, ...]
    """Ids of the spans that it links to."""
    error: str

    @property
    def length_ns(self) -> int:
        return self.end_ns - self.start_ns


class Tree:
    """The spans of one version."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = tuple(nodes)
        self._by_id = {node.span_id: node for node in self.nodes}

    def named(self, word: str, service: str = "") -> list[Node]:
        """In the order of their starts."""
        found = [n for n in self.nodes if n.word == word and service in ("", n.service)]
        return sorted(found, key=lambda node: node.start_ns)

    def one(self, word: str, service: str = "") -> Node:
        (node,) = self.named(word, service)
        return node

    def children(self, parent: Node) -> list[Node]:
        found = [node for node in self.nodes if node.parent_id == parent.span_id]
        return sorted(found, key=lambda node: node.start_ns)

    def check(self, *, roots: Iterable[str], within_ns: int) -> None:
        """One trace, no orphan, no negative duration, children inside their parents.

        Args:
            roots: the first words of the spans that have no parent.
            within_ns: how much earlier than what it follows from a span of another process may
                begin: the residuals of both clocks.
        """
        assert len(self._by_id) == len(self.nodes)
        assert len({node.trace_id for node in self.nodes}) == 1
        assert sorted(node.word for node in self.nodes if not node.parent_id) == sorted(roots)
        for node in self.nodes:
            assert node.start_ns <= node.end_ns, node
            assert node.kind == KINDS[node.word], node
            if not node.parent_id:
                continue
            parent = self._by_id.get(node.parent_id)
            assert parent is not None, f"an orphan: {node}"
            assert parent.word in PARENTS[node.word], node
            if node.word == "update":
                assert parent.start_ns - within_ns <= node.start_ns, (parent, node)
            else:
                assert parent.service == node.service
                assert parent.start_ns <= node.start_ns, (parent, node)
                assert node.end_ns <= parent.end_ns, (parent, node)

    def check_twins(self, stages: Iterable[StageComplete], tokens: Iterable[FirstToken]) -> None:
        """What the bus was told of them, and nothing else, was exported."""
        told = {stage.span_id: stage for stage in stages}
        words = {"negotiate", "fetch", "h2d", "broadcast", "reload", "commit"}
        exported = {node.span_id for node in self.nodes if node.word in words}
        assert exported == told.keys()
        for span_id, stage in told.items():
            node = self._by_id[span_id]
            assert (node.word, node.trace_id) == (stage.stage, stage.trace_id)
            assert (node.start_ns, node.end_ns) == (stage.start_ns, stage.end_ns)
            assert (node.parent_id, node.error) == (stage.parent_span_id, stage.error)
            assert node.attributes["weightbus.bytes"] == stage.bytes
            buckets = self.children(node) if stage.stage != "negotiate" else []
            assert len(buckets) == len(stage.buckets)
            for bucket, timing in zip(
                sorted(buckets, key=lambda each: int(each.attributes["weightbus.bucket"])),
                stage.buckets,
                strict=True,
            ):
                assert (bucket.start_ns, bucket.end_ns) == (timing.start_ns, timing.end_ns)
                assert bucket.attributes["weightbus.bytes"] == timing.bytes
        seen = {token.span_id: (token.start_ns, token.end_ns) for token in tokens}
        found = {node.span_id: (node.start_ns, node.end_ns) for node in self.named("first token")}
        assert found == seen


def tree_of(collector: Collector, model: str, version: int) -> Tree:
    """Every span that the collector has of a version; each has the attributes that the document
    tells of spans of its name, and no other."""
    nodes = [_node(service, span) for service, spans in collector.spans.items() for span in spans]
    wanted = {"weightbus.model": model, "weightbus.version": version}
    return Tree(node for node in nodes if wanted.items() <= node.attributes.items())


def _node(service: str, span: Span) -> Node:
    word = WORDS[span.name]
    attributes = {item.key: _value(word, item.key, item.value) for item in span.attributes}
    failed = span.status.code == span.status.STATUS_CODE_ERROR
    assert failed == ("error.type" in attributes), span
    return Node(
        service=service,
        word=word,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        kind=Span.SpanKind.Name(span.kind),
        attributes=attributes,
        links=tuple(link.span_id.hex() for link in span.links),
        error=span.status.message,
    )


def _value(word: str, key: str, value: AnyValue) -> AttributeValue:
    kind = value.WhichOneof("value")
    assert kind is not None
    assert ALLOWED[word].get(key) == kind, f"{key} of {word} is not documented so: {kind}"
    found: AttributeValue = getattr(value, kind)
    return found
