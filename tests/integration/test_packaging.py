"""The built packages hold every module and work away from the checkout."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("schemas", "bus", "producers", "consumers", "tracing", "cli")
BUILD_DEADLINE_S = 120


def _run(*argv: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in argv],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=BUILD_DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, f"{argv} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist, as an index would serve it."""
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", out, cwd=ROOT)
    (sdist,) = out.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    _run(*pip, "-w", out, sdist, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_file_of_the_page_and_nothing_else_when_built_from_sdist(
    wheel: Path,
) -> None:
    expected = {
        f"weightbus/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for pattern in ("*.py", "static/*")
        for path in (ROOT / folder).rglob(pattern)
    } | {"weightbus/__init__.py", "weightbus/__main__.py", "weightbus/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_wheel_imports_and_runs_when_installed_away_from_the_checkout(
    wheel: Path, tmp_path: Path
) -> None:
    venv.EnvBuilder(system_site_packages=False, with_pip=False).create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target")
    _run(*pip, target, wheel, cwd=tmp_path)
    here = {path for path in sys.path if path.endswith("site-packages")}
    script = (
        f"import sys; sys.path[:0] = [{str(target)!r}]; sys.path += {sorted(here)!r}; "
        "import weightbus; print(weightbus.__file__); "
        "from weightbus.cli.main import main; sys.argv[1:] = ['--version']; main()"
    )
    printed = _run(python, "-c", script, cwd=tmp_path)
    assert printed.startswith(str(target)), printed
    assert "0.1.0" in printed
