"""Who may import whom, and what starts without torch. Reads the sources and asks a subprocess."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]

MAY_IMPORT: Final[dict[str, set[str]]] = {
    "schemas": set(),
    "bus": {"schemas"},
    "tracing": {"schemas"},
    "producers": {"schemas", "bus", "tracing"},
    "consumers": {"schemas", "bus", "tracing"},
    "cli": {"schemas", "bus", "tracing", "producers", "consumers"},
}
"""Folder -> the other folders that it may import."""

HEAVY: Final = frozenset(
    {"torch", "numpy", "zmq", "triton", "mooncake", "vllm", "sglang", "safetensors", "transformers"}
)
"""What only the edges may import."""

LIGHT_BUT: Final[dict[str, tuple[str, ...]]] = {
    "schemas": (),
    "bus": ("bus/digest.py", "bus/digest_gpu.py"),
    "tracing": (),
    "cli": ("cli/demo/",),
}
"""Folder that starts without heavy packages -> what in it does not: the digests, which only
producers and consumers import, and the demo's trainer, a process of its own."""

FORBIDDEN: Final = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"})

PLANNING_MAY_NOT: Final = HEAVY - {"numpy"} | {
    "anyio",
    "asyncio",
    "nats",
    "os",
    "socket",
    "subprocess",
    "threading",
    "time",
}
"""`consumers/planning` is pure: no I/O, no torch, no clock."""


@cache
def sources(folder: str) -> tuple[Path, ...]:
    """Every Python file of a folder, relative to the repository."""
    return tuple(sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")))


@cache
def imports(path: Path) -> tuple[tuple[int, str, bool], ...]:
    """(line, dotted name, whether it runs when the module is imported) of every import."""
    return tuple(_imports(ast.parse((ROOT / path).read_bytes()), at_import=True))


def _imports(node: ast.AST, *, at_import: bool) -> Iterator[tuple[int, str, bool]]:
    for child in ast.iter_child_nodes(node):
        inside = at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            inside = False
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name, at_import) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (
                (child.lineno, f"{'.' * child.level}{child.module or ''}.{alias.name}", at_import)
                for alias in child.names
            )
        else:
            yield from _imports(child, at_import=inside)


def everything() -> list[Path]:
    folders = (*MAY_IMPORT, "tests", "benchmarks", "examples")
    return [path for folder in folders for path in sources(folder)]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folder_imports_only_the_layers_below_it(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | {folder, "__version__"}
    wrong = [
        f"{path}:{line} imports {name}"
        for path in sources(folder)
        for line, name, _ in imports(path)
        if name.startswith("weightbus.") and name.split(".")[1] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_a_folder_by_its_bare_name_or_a_relative_path() -> None:
    wrong = [
        f"{path}:{line} imports {name}"
        for path in everything()
        for line, name, _ in imports(path)
        if name.startswith(".") or name.split(".")[0] in MAY_IMPORT
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_what_unpickles() -> None:
    wrong = [
        f"{path}:{line} imports {name}"
        for path in everything()
        for line, name, _ in imports(path)
        if name.split(".")[0] in FORBIDDEN
    ]
    assert not wrong, "\n".join(wrong)


def test_no_file_of_the_product_imports_the_tests() -> None:
    wrong = [
        f"{path}:{line} imports {name}"
        for folder in MAY_IMPORT
        for path in sources(folder)
        for line, name, _ in imports(path)
        if name.split(".")[0] == "tests"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", LIGHT_BUT)
def test_light_folder_imports_no_heavy_package_when_it_is_imported(folder: str) -> None:
    wrong = [
        f"{path}:{line} imports {name}"
        for path in sources(folder)
        if not str(path).startswith(LIGHT_BUT[folder])
        for line, name, at_import in imports(path)
        if at_import and name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_schemas_import_msgspec_and_the_standard_library_only() -> None:
    wrong = [
        f"{path}:{line} imports {name}"
        for path in sources("schemas")
        for line, name, _ in imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names | {"msgspec", "weightbus"}
    ]
    assert not wrong, "\n".join(wrong)


def test_planning_imports_nothing_that_acts_or_tells_the_time() -> None:
    wrong = [
        f"{path}:{line} imports {name}"
        for path in sources("consumers/planning")
        for line, name, _ in imports(path)
        if name.split(".")[0] in PLANNING_MAY_NOT
    ]
    assert not wrong, "\n".join(wrong)


MONITORS: Final = ("serve", "watch", "trace", "schema", "plan", "doctor")
"""Commands that run wherever the core is installed."""

CORE: Final = (
    "schemas",
    "bus",
    "tracing",
    "cli.main",
    "cli.ui",
    *(f"cli.{name}" for name in MONITORS),
)


@pytest.mark.parametrize("folder", CORE)
def test_core_loads_neither_torch_nor_numpy_nor_zmq(folder: str) -> None:
    code = f"import sys, weightbus.{folder}\nprint(*sorted({set(HEAVY)!r} & sys.modules.keys()))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    )
    assert done.stdout.split() == []
