"""docs/vllm.md says what the code does: options, choices, modules, messages, links."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from weightbus.cli.consume import command as consume
from weightbus.cli.demo import command as demo
from weightbus.cli.engines import KEY_VARIABLE
from weightbus.cli.publish import command as publish

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "vllm.md").read_text()
README = (ROOT / "README.md").read_text()
COMMANDS = {"consume": consume, "demo": demo, "publish": publish}

OF_VLLM = frozenset(
    {
        "--api-key",
        "--disable-access-log-for-endpoints",
        "--disable-fastapi-docs",
        "--dtype",
        "--enable-expert-parallel",
        "--enforce-eager",
        "--gpu-memory-utilization",
        "--host",
        "--load-format",
        "--model",
        "--quantization",
        "--weight-transfer-config",
        "--worker-extension-cls",
    }
)
"""Options of vLLM's that the guide names."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def options(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


def commands(text: str) -> Iterator[list[str]]:
    """Command lines of ours in the text's shell blocks."""
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "weightbus" in words[:1]:
                yield words[1:]


def section(title: str) -> str:
    return GUIDE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def messages() -> list[str]:
    """Every string of the consumer's side, with `…` where something is filled in."""
    found = []
    for path in (ROOT / "consumers").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize("text", [GUIDE, README], ids=["guide", "readme"])
def test_commands_have_the_options_that_are_shown(text: str) -> None:
    shown = [words for words in commands(text) if words[0] in COMMANDS]
    assert any("--engine" in words for words in shown)
    for name, *words in shown:
        given = {word for word in words if word.startswith("--")}
        assert given <= options(COMMANDS[name]), (name, words)


def test_every_option_that_the_guide_names_is_somebody_s() -> None:
    ours = set().union(*map(options, COMMANDS.values()))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", GUIDE))
    assert named <= ours | OF_VLLM, named - ours - OF_VLLM
    assert {"--url", "--pause", "--sleeping", "--caches", "--engine-dir"} <= named
    assert KEY_VARIABLE in GUIDE


def test_guide_has_a_row_for_every_way_to_pause() -> None:
    (pause,) = (each for each in consume.params if each.name == "pause")
    assert isinstance(pause.type, click.Choice)
    rows = re.findall(r"^\| `(\w+)`", section("Running requests and caches"), re.MULTILINE)
    assert rows == list(pause.type.choices)
    assert f"| `{pause.default}` (default) |" in GUIDE


def test_every_message_that_the_guide_explains_is_one_that_we_give() -> None:
    table = section("When something is wrong")
    rows = re.findall(r"^\| `([^|]+)` \|", table, re.MULTILINE)
    assert len(rows) > 10
    given = messages()
    for row in rows:
        pattern = re.compile(".*?".join(map(re.escape, row.split("…"))), re.DOTALL)
        assert any(pattern.search(message) for message in given), row


def test_example_is_python_and_imports_what_there_is() -> None:
    (example,) = blocks(GUIDE, "python")
    for node in ast.walk(ast.parse(example)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("weightbus"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), (node.module, alias.name)


def test_links_of_the_guide_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        path, _, anchor = target.partition("#")
        file = ROOT / "docs" / path if path else ROOT / "docs" / "vllm.md"
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, target
