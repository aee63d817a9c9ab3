"""`weightbus doctor`: what is missing is said, and what is measured can be read by a consumer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click.testing
import msgspec
import pytest

from weightbus.cli.doctor import command
from weightbus.consumers.cards import network_cards
from weightbus.schemas.rounds import Links


def test_rates_are_measured_and_written_for_a_consumer(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "links.json"
    arguments = ["--dir", tmp_path, "--json", file, "--network-gbit", "400", "--cards", "8"]
    done = click.testing.CliRunner().invoke(command, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output
    links = msgspec.json.decode(file.read_bytes(), type=Links)
    assert (links.network, links.cards) == (50_000_000_000, 8)
    for name in ("memory", "disk", "broadcast"):
        assert getattr(links, name) > 10**6, done.output
    assert (links.p2p > 10**6) == ("ok  rate: p2p" in done.output), done.output
    assert not list(Path("/dev/shm").glob("weightbus-doctor.*"))


def test_what_is_missing_is_a_line_of_the_table() -> None:
    program = (
        "import sys\n"
        "sys.modules['numpy'] = None\n"
        "from weightbus.cli.main import run, cli\n"
        "sys.exit(run(cli, ['doctor', '--network-gbit', '10']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count("needs numpy: pip install 'weightbus[torch]'") == 3
    assert "1 x 1.25 GB/s" in done.stdout


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    for name, speed, state in (
        ("eth0", "100000", "up"),
        ("eth1", "100000", "up"),
        ("eth2", "10000", "up"),
        ("eth3", "400000", "down"),
        ("veth", "-1", "up"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "speed").write_text(f"{speed}\n")
        (tmp_path / name / "operstate").write_text(f"{state}\n")
    (tmp_path / "lo").mkdir()
    return tmp_path


def test_fastest_cards_that_are_up_count(cards: Path) -> None:
    assert network_cards(cards) == (12_500_000_000, 2)
    assert network_cards(cards / "lo") == (0, 1)
    assert network_cards(cards / "none") == (0, 1)
