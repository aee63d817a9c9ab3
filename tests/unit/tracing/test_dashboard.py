"""The Grafana dashboard asks for nothing that is not exported, and leaves nothing out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from tests.unit.tracing.everything import measure_everything
from tests.unit.tracing.test_prometheus import free_port, scrape, settings_of
from weightbus.tracing.metric_names import METRICS, prometheus_name
from weightbus.tracing.telemetry import open_telemetry

DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana" / "weightbus.json"

VARIABLES = {"$__rate_interval": "5m", "$model": "m", "$engine": "a"}
LABEL_VALUES = re.compile(r"label_values\((?P<series>.+), (?P<label>\w+)\)\Z")
LEGEND_LABEL = re.compile(r"{{(\w+)}}")

Labels = frozenset[str]
Exported = dict[str, set[Labels]]


@pytest.fixture(scope="module")
def exported() -> Exported:
    """Series that Prometheus reads -> the sets of labels that they come with."""
    port = free_port()
    with open_telemetry("x", otlp=settings_of(port)) as telemetry:
        measure_everything(telemetry)
        return {
            name: {frozenset(labels) for labels, _ in samples}
            for name, samples in scrape(port).items()
        }


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


def panels() -> list[Any]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def parsed(expression: str) -> Any:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return promql_parser.parse(expression)


def selectors(node: Any) -> Iterator[Any]:
    """The series that an expression asks for."""
    found: list[Any] = []

    def visit(each: Any) -> None:
        if isinstance(each, promql_parser.VectorSelector):
            found.append(each)
        elif isinstance(each, promql_parser.MatrixSelector):
            found.append(each.vector_selector)

    promql_parser.walk(node, visit)
    return iter(found)


def groupings(node: Any) -> list[Any]:
    found: list[Any] = []

    def visit(each: Any) -> None:
        if isinstance(each, promql_parser.AggregateExpr):
            found.append(each)

    promql_parser.walk(node, visit)
    return found


def labels_asked(node: Any) -> set[str]:
    """By which an expression selects or groups."""
    matched = {m.name for each in selectors(node) for m in each.matchers.matchers}
    grouped = {
        label
        for each in groupings(node)
        if each.modifier is not None
        for label in each.modifier.labels
    }
    return matched | grouped


def queries() -> list[tuple[str, str, str]]:
    """Title, expression and legend."""
    return [
        (panel["title"], target["expr"], target["legendFormat"])
        for panel in panels()
        for target in panel["targets"]
    ]


def check(node: Any, asked: set[str], exported: Exported) -> None:
    names = {each.name for each in selectors(node)}
    assert names, "it asks for nothing"
    for name in names:
        assert name in exported, f"{name} is not exported"
    missing = asked - {label for name in names for labels in exported[name] for label in labels}
    assert not missing, f"{names} have no {missing}"


@pytest.mark.parametrize(("title", "expression", "legend"), queries())
def test_series_and_labels_of_a_query_are_exported(
    title: str, expression: str, legend: str, exported: Exported
) -> None:
    del title
    node = parsed(expression)
    check(node, labels_asked(node) | set(LEGEND_LABEL.findall(legend)), exported)
    kept = [set(each.modifier.labels) for each in groupings(node) if each.modifier is not None]
    for labels in kept:
        assert set(LEGEND_LABEL.findall(legend)) <= labels, "the legend names what was summed away"


@pytest.mark.parametrize("variable", ["model", "engine"])
def test_variables_are_filled_from_what_is_exported(variable: str, exported: Exported) -> None:
    (found,) = [v for v in dashboard()["templating"]["list"] if v["name"] == variable]
    asked = LABEL_VALUES.fullmatch(found["query"]["query"])
    assert asked is not None
    node = parsed(asked["series"])
    (selector,) = selectors(node)
    for name in (selector.name or selector.matchers.matchers[0].value).split("|"):
        assert any(asked["label"] in labels for labels in exported[name])


def test_every_metric_that_is_exported_is_shown() -> None:
    shown = {each.name for _, expr, _ in queries() for each in selectors(parsed(expr))}
    missing = [
        spec.name
        for spec in METRICS
        if not any(name.startswith(prometheus_name(spec)) for name in shown)
    ]
    assert missing == []


def test_everything_that_is_in_the_catalogue_is_exported(exported: Exported) -> None:
    for spec in METRICS:
        name = prometheus_name(spec) + ("_bucket" if spec.kind == "histogram" else "")
        attributes = {attribute.replace(".", "_") for attribute in spec.attributes}
        labels = {label for each in exported[name] for label in each} - {"le", "service_name"}
        assert labels == attributes, spec.name


def test_panels_have_numbers_places_and_a_data_source_of_their_own() -> None:
    whole = dashboard()
    numbers = [panel["id"] for panel in whole["panels"]]
    assert len(set(numbers)) == len(numbers)
    cells: set[tuple[int, int]] = set()
    for panel in whole["panels"]:
        at = panel["gridPos"]
        taken = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not taken & cells, f"{panel['title']} lies on another"
        assert at["x"] + at["w"] <= 24
        cells |= taken
    for panel in panels():
        assert panel["description"]
        for source in (panel["datasource"], *(t["datasource"] for t in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}
    assert [v["type"] for v in whole["templating"]["list"]] == ["datasource", "query", "query"]
