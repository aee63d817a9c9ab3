"""What `weightbus consume` makes of its options before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import click.testing
import pytest

from weightbus.cli import consume
from weightbus.cli.engines import TorchChoice
from weightbus.cli.links import read_links
from weightbus.schemas.rounds import Links

ENGINE = ("--model", "m", "--engine-id", "e", "--engine-dir", "/nowhere")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[consume.Options]:
    """What would have been run. The home directory is empty."""
    found: list[consume.Options] = []

    def run(_: Any, options: consume.Options) -> None:
        found.append(options)

    monkeypatch.setattr("anyio.run", run)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("WEIGHTBUS_ADDRESS", "WEIGHTBUS_ROUTE", "WEIGHTBUS_LINKS", "WEIGHTBUS_NATS_URL"):
        monkeypatch.delenv(name, raising=False)
    return found


def invoke(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(consume.command, [*ENGINE, *arguments])


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        (("--nats", "nats://127.0.0.1:4222"), "127.0.0.1"),
        (("--nats", "nats://127.9.9.9:4222"), "127.0.0.1"),
        (("--nats", "nats://127.0.0.1:4222", "--address", "127.0.0.7"), "127.0.0.7"),
        ((), "127.0.0.1"),
    ],
)
def test_address_is_the_one_towards_nats_when_none_is_given(
    asked: list[consume.Options], arguments: tuple[str, ...], address: str
) -> None:
    assert invoke(*arguments).exit_code == 0
    assert [options.consumer.address for options in asked] == [address]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--p2p-protocol", "foo"), "'foo' is not one of"),
        (("--engine-id", "a.b"), "'--engine-id': 'a.b' is not 1 to 64 of the characters"),
        (("--model", "a b"), "'--model': 'a b' is not 1 to 64 of the characters"),
        (("--host-id", ""), "'' is not 1 to 128 of the characters"),
        (("--host-id", "a b"), "'a b' is not 1 to 128 of the characters"),
        (("--address", "nonsense..host"), "'nonsense..host' must be an address of this host"),
        (("--address", "192.0.2.1"), "'192.0.2.1' must be an address of this host"),
        (("--address", ""), "'' must be an address of this host"),
        (("--staging-bytes", "1000"), "1000 must be 1MiB at least"),
        (("--config", "junk"), "Invalid value for --config: 'junk' of the torch engine"),
        (("--device", "gpu"), "'gpu' must be cpu, cuda, or cuda: and a number"),
        (("--device", "cuda:x"), "'cuda:x' must be cpu, cuda, or cuda: and a number"),
        (("--links", "/dev/null"), "--links"),
    ],
)
def test_option_is_refused_by_its_name_when_it_can_never_work(
    asked: list[consume.Options], arguments: tuple[str, str], reason: str
) -> None:
    done = invoke(*arguments, "--architecture", "decoder")
    assert done.exit_code == 2, done.output
    said = " ".join(done.output.replace("│", " ").split())
    assert reason in said
    assert arguments[0] in said
    assert asked == []


def test_engine_is_started_on_the_device_that_was_asked_for(asked: list[consume.Options]) -> None:
    assert invoke("--architecture", "decoder").exit_code == 0
    assert invoke("--architecture", "decoder", "--device", "cuda:2", "--tp", "2").exit_code == 0
    specs = [options.engine.spawn for options in asked if isinstance(options.engine, TorchChoice)]
    ranks = [spec and list(map(spec.device_of, range(2))) for spec in specs]
    assert ranks == [["cpu", "cpu"], ["cuda:2", "cuda:3"]]


def test_least_staging_is_accepted(asked: list[consume.Options]) -> None:
    assert invoke("--staging-bytes", "1MiB", "--p2p-protocol", "rdma").exit_code == 0
    assert invoke("--staging-bytes", "0").exit_code == 0
    assert [options.consumer.staging_bytes for options in asked] == [2**20, 0]


def test_broadcast_alone_is_refused_because_no_first_version_comes_by_it(
    asked: list[consume.Options],
) -> None:
    done = invoke("--route", "broadcast")
    assert done.exit_code == 2
    assert "needs --route local or --route p2p beside it" in " ".join(done.output.split())
    assert invoke("--route", "broadcast", "--route", "p2p").exit_code == 0
    assert [options.consumer.routes for options in asked] == [("broadcast", "p2p")]


def test_links_are_read_from_the_usual_place_when_no_file_is_named(
    asked: list[consume.Options], tmp_path: Path
) -> None:
    invoke()
    (tmp_path / "weightbus").mkdir()
    (tmp_path / "weightbus" / "links.json").write_text('{"network": 7, "cards": 2}')
    invoke()
    (tmp_path / "other.json").write_text('{"network": 8}')
    invoke("--links", str(tmp_path / "other.json"))
    links = [options.consumer.links for options in asked]
    assert links == [Links(), Links(network=7, cards=2), Links(network=8)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"netwrk": 7}', "unknown field `netwrk`"),
        ('{"network": -7}', "Expected `int` >= 0"),
        ("junk", "holds no rates of a host"),
    ],
)
def test_links_are_refused_when_they_are_none(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "links.json").write_text(text)
    with pytest.raises(click.BadParameter, match=reason):
        read_links(tmp_path / "links.json")
