"""`weightbus doctor`: what is missing is said, and what is measured can be read by a consumer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import anyio
import click.testing
import pytest

from weightbus.cli import doctor
from weightbus.cli.doctor import command
from weightbus.cli.links import read_links
from weightbus.consumers.cards import card_holding, network_cards


def invoke(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(command, [str(one) for one in arguments])


def test_rates_are_measured_and_written_for_a_consumer(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "links.json"
    done = invoke("--dir", tmp_path, "--output", file, "--network-gbit", "400", "--cards", "8")
    assert done.exit_code == ("\n--" in done.output), done.output
    links = read_links(file)
    assert (links.network, links.cards) == (50_000_000_000, 8)
    for name in ("memory", "disk", "broadcast"):
        assert getattr(links, name) > 10**6, done.output
    assert (links.p2p > 10**6) == ("ok  rate: p2p" in done.output), done.output
    assert not list(Path("/dev/shm").glob("weightbus-doctor.*"))
    assert os.listdir(file.parent) == ["links.json"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--network-gbit", "nan"), "nan is no rate"),
        (("--network-gbit", "inf"), "--network-gbit"),
        (("--network-gbit", "-1"), "--network-gbit"),
        (("--cards", "1025"), "--cards"),
        (("--dir", "/nowhere"), "does not exist"),
        (("--output", "/proc/x/y"), "/proc/x/y cannot be written: No such file"),
        (("--output", "/proc"), "is a directory"),
    ],
)
def test_nothing_is_measured_when_the_arguments_are_wrong(
    arguments: tuple[str, str], reason: str
) -> None:
    start = time.perf_counter()
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert reason in " ".join(done.output.replace("│", " ").split())
    assert time.perf_counter() - start < 1.0


def test_file_stays_as_it_was_when_measuring_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(anyio, "run", interrupted)
    (tmp_path / "links.json").write_text("{}")
    assert invoke("--output", tmp_path / "links.json").exit_code == 1
    assert (tmp_path / "links.json").read_text() == "{}"
    assert os.listdir(tmp_path) == ["links.json"]


def test_what_cannot_be_measured_is_a_line_of_the_table() -> None:
    done = invoke("--address", "192.0.2.1", "--network-gbit", "10")
    assert done.exit_code == 1
    assert "-- rate: broadcast route broadcast is not available" in " ".join(done.output.split())


def test_failed_checks_are_named_in_the_last_line() -> None:
    done = invoke("--address", "192.0.2.1", "--network-gbit", "10")
    last = done.output.splitlines()[-1]
    assert last.startswith("failed: ")
    assert "rate: broadcast, rate: p2p" in last


def test_nothing_has_failed_when_only_notes_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    async def measured(name: str, measure: object) -> tuple[doctor.Finding, int]:
        return doctor.Finding(f"rate: {name}", "fast"), 10**9

    monkeypatch.setattr(doctor, "_measured", measured)
    monkeypatch.setattr(doctor, "_cards", lambda options: (0, 1))
    monkeypatch.setattr(doctor, "_server", lambda: doctor.Finding("nats-server", "here"))
    monkeypatch.setattr(doctor, "_package", lambda name: doctor.Finding(name, "1"))
    done = invoke()
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert "note network cards the system does not say: --network-gbit" in words
    assert words.count("the planner takes") == 2
    assert "failed" not in words


def test_what_is_missing_is_a_line_of_the_table() -> None:
    program = (
        "import sys\n"
        "sys.modules['numpy'] = None\n"
        "from weightbus.cli.main import run, cli\n"
        "sys.exit(run(cli, ['doctor', '--network-gbit', '10']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("needs numpy: pip install 'weightbus[torch]'") == 3
    assert "1 x 1.25 GB/s" in done.stdout


def test_broken_package_is_a_line_of_the_table() -> None:
    program = (
        "import sys, types\n"
        "class Broken:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch':\n"
        "            raise OSError('libtorch_cpu.so: cannot open shared object file')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from weightbus.cli.main import run, cli\n"
        "sys.exit(run(cli, ['doctor', '--network-gbit', '10']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert "-- rate: broadcast OSError: libtorch_cpu.so" in " ".join(done.stdout.split())


def card(
    directory: Path, name: str, speed: int, *kinds: str, state: str = "up", lower: str = ""
) -> None:
    """What the system says of a card; `kinds` are what it has: device, bonding, bonding_slave."""
    (directory / name).mkdir()
    (directory / name / "speed").write_text(f"{speed}\n")
    (directory / name / "operstate").write_text(f"{state}\n")
    for kind in (*kinds, *([f"lower_{lower}"] if lower else [])):
        (directory / name / kind).mkdir()


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    card(tmp_path, "eth0", 100_000, "device")
    card(tmp_path, "eth1", 100_000, "device")
    card(tmp_path, "eth2", 10_000, "device")
    card(tmp_path, "eth3", 400_000, "device", state="down")
    card(tmp_path, "veth0", 400_000)
    card(tmp_path, "br0", 400_000, lower="veth0")
    card(tmp_path, "vlan.7", 400_000, lower="eth2")
    (tmp_path / "lo").mkdir()
    return tmp_path


def test_fastest_cards_that_are_up_count(cards: Path) -> None:
    assert network_cards(cards) == (12_500_000_000, 2)
    assert network_cards(cards / "lo") == (0, 1)
    assert network_cards(cards / "none") == (0, 1)


def test_bond_counts_instead_of_its_parts(cards: Path) -> None:
    card(cards, "eth4", 200_000, "device", "bonding_slave")
    card(cards, "eth5", 200_000, "device", "bonding_slave")
    card(cards, "bond0", 400_000, "bonding", lower="eth4")
    assert network_cards(cards) == (50_000_000_000, 1)
    assert network_cards(cards, "bond0") == (50_000_000_000, 1)


@pytest.mark.parametrize(
    ("name", "megabits"),
    [("eth2", 10_000), ("vlan.7", 10_000), ("eth3", 0), ("veth0", 0), ("br0", 0), ("lo", 0)],
)
def test_one_card_counts_when_it_is_named(cards: Path, name: str, megabits: int) -> None:
    assert network_cards(cards, name) == (megabits * 125_000, 1)


def test_interface_is_found_by_its_address() -> None:
    assert card_holding("127.0.0.1") == "lo"
    assert card_holding("192.0.2.1") is None
    assert card_holding("not an address") is None
