"""Trainers in bash, C and Node.js: real clients, a real bus, a real engine that follows."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread
import pytest
import torch
from safetensors.torch import load_file

from tests.integration.bus.raw import raw_client
from tests.integration.examples.languages import (
    CONFIG,
    LANGUAGES,
    Published,
    command_of,
    publish,
    tensors_of,
)
from tests.integration.examples.rude_server import rude_server
from tests.nats_server import NatsServer
from weightbus.bus.guard import guarded_command
from weightbus.consumers.engines.torch.client import open_torch_client
from weightbus.consumers.engines.torch.fingerprint import fingerprint
from weightbus.consumers.engines.torch.models import build_model
from weightbus.schemas import CONTENT_TYPE_JSON, DeadLetter, encode

pytestmark = pytest.mark.anyio

WAIT_S = 60
SHORT_WAIT_S = 4
"""For what will not come; what tells why has come long before."""
LETTERS_APART_S = 0.005
"""Many, while a round goes on."""


class Following(NamedTuple):
    """A consumer with an engine of its own."""

    url: str
    model: str
    root: Path
    """Below it the consumer reads files."""
    directory: Path
    """Of the engine's sockets."""
    versions: Iterator[int]
    """Each greater than those before."""


@pytest.fixture(scope="module")
def following(
    shared_server: NatsServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Following]:
    model, root = f"m{uuid.uuid4().hex[:12]}", tmp_path_factory.mktemp("checkpoints")
    short = Path(tempfile.mkdtemp(prefix="wb-"))
    made = Following(shared_server.url, model, root, short / "engine", itertools.count(1))
    try:
        with consumer(made):
            yield made
    finally:
        shutil.rmtree(short, ignore_errors=True)


@contextmanager
def consumer(following: Following) -> Iterator[None]:
    """`weightbus consume`; entered once it follows."""
    options = {
        "--model": following.model,
        "--engine-id": "a",
        "--nats": following.url,
        "--engine-dir": str(following.directory),
        "--architecture": "decoder",
        "--config": json.dumps(CONFIG),
        "--root": str(following.root),
        "--route": "local",
    }
    words = [word for option in options.items() for word in option]
    with subprocess.Popen(
        guarded_command([sys.executable, "-m", "weightbus", "consume", *words]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if f"follows {following.model}" in line:
                break
        else:
            pytest.fail(f"the consumer ended: {printed}")
        yield
        process.stdin.close()
        process.stdout.read()


@pytest.fixture(scope="module", params=LANGUAGES)
def command(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The example in one language."""
    return command_of(request.param, tmp_path_factory.mktemp("built"))


async def published(
    command: list[str], following: Following, version: int, wait_s: int = WAIT_S
) -> Published:
    file = following.root / f"{version}.safetensors"
    run = partial(publish, command, following.url, following.model, version, file, wait_s)
    return await anyio.to_thread.run_sync(run)


def waited_in_vain(ended: Published) -> bool:
    """Whether the deadline passed."""
    return "within" in ended.error or "in time" in ended.error


async def publish_nonsense(url: str, model: str) -> None:
    """As if another trainer sent what cannot be read, without end."""
    nonsense = b'{"version":-1}'
    letter = DeadLetter(
        model=model,
        subject=f"weightbus.{model}.checkpoint.ready",
        reason="nonsense of another",
        payload=nonsense,
        payload_bytes=len(nonsense),
    )
    async with raw_client(url) as client:
        while True:
            await client.publish(f"weightbus.{model}.dead", encode(letter, CONTENT_TYPE_JSON))
            await client.flush()
            await anyio.sleep(LETTERS_APART_S)


async def test_engine_holds_what_the_example_wrote_when_the_round_is_over(
    command: list[str], following: Following
) -> None:
    version = next(following.versions)
    ended = await published(command, following, version)
    assert (ended.exit_code, ended.error) == (0, "")
    assert ended.said is not None
    assert (ended.said["type"], ended.said["version"]) == ("RoundComplete", version)
    assert (ended.said["completed"], ended.said["failed"]) == (["a"], {})

    found = load_file(following.root / f"{version}.safetensors")
    expected = tensors_of(version)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    whole = build_model("decoder", CONFIG)
    whole.load_weights(expected.items())
    async with open_torch_client(following.directory) as client:
        held = await client.fingerprint(WAIT_S)
    assert (held.version, held.fingerprints) == (version, (fingerprint(whole),))


async def test_reason_on_dead_is_printed_when_the_example_publishes_nonsense(
    command: list[str], following: Following
) -> None:
    version = -next(following.versions)
    ended = await published(command, following, version)
    assert (ended.exit_code, ended.said) == (1, None)
    assert "dead letter" in ended.error
    assert f"CheckpointReady: version is {version}: must be int >= 0" in ended.error


async def test_example_fails_at_once_when_its_version_was_published_before(
    command: list[str], following: Following
) -> None:
    version = next(following.versions)
    assert (await published(command, following, version)).exit_code == 0
    ended = await published(command, following, version)
    assert (ended.exit_code, ended.said) == (1, None)
    assert "not stored" in ended.error
    assert "duplicate" in ended.error


async def test_example_fails_at_once_when_a_later_version_is_served(
    command: list[str], following: Following
) -> None:
    older, newer = next(following.versions), next(following.versions)
    assert (await published(command, following, newer)).exit_code == 0
    ended = await published(command, following, older, SHORT_WAIT_S)
    assert (ended.exit_code, ended.said) == (1, None)
    assert "not new" in ended.error
    assert f"version {older} is older than version {newer}, which is served" in ended.error
    assert not waited_in_vain(ended)


async def test_dead_letters_of_others_are_passed_over(
    command: list[str], following: Following
) -> None:
    version = next(following.versions)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish_nonsense, following.url, following.model)
        ended = await published(command, following, version)
        tasks.cancel_scope.cancel()
    assert (ended.exit_code, ended.error) == (0, "")


async def test_example_fails_before_its_deadline_when_the_server_throws_it_out(
    command: list[str], following: Following
) -> None:
    with rude_server() as url:
        rude = following._replace(url=url)
        ended = await published(command, rude, next(following.versions), WAIT_S)
    assert (ended.exit_code, ended.said) == (1, None)
    assert not waited_in_vain(ended)
    assert ended.error.splitlines()[-1].startswith("publish")


async def test_reason_of_the_engine_is_printed_when_the_file_lies_outside_its_roots(
    command: list[str], following: Following, tmp_path: Path
) -> None:
    version = next(following.versions)
    elsewhere = following._replace(root=tmp_path)
    ended = await published(command, elsewhere, version, SHORT_WAIT_S)
    assert (ended.exit_code, ended.said) == (1, None)
    assert f"must lie below an allowed root: {following.root}" in ended.error


@pytest.mark.parametrize("version", ["abc", "1.5", "99999999999999999999"])
async def test_example_refuses_a_version_that_is_none(
    version: str, command: list[str], following: Following
) -> None:
    file = following.root / "none.safetensors"
    run = partial(publish, command, following.url, following.model, version, file, WAIT_S)
    ended = await anyio.to_thread.run_sync(run)
    assert (ended.exit_code, ended.said) == (1, None)
    assert f"{version}: is no version" in ended.error
    assert not file.exists()


async def test_example_says_so_when_nobody_answers(
    command: list[str], following: Following
) -> None:
    alone = following._replace(model=f"{following.model}-none")
    ended = await published(command, alone, next(following.versions), SHORT_WAIT_S)
    assert (ended.exit_code, ended.said) == (1, None)
    assert waited_in_vain(ended)
    assert "nobody has answered" in ended.error


async def test_example_fails_by_name_when_there_is_no_bus(
    command: list[str], following: Following
) -> None:
    nowhere = following._replace(url="nats://127.0.0.1:1")
    ended = await published(command, nowhere, next(following.versions), SHORT_WAIT_S)
    assert (ended.exit_code, ended.said) == (1, None)
    last = ended.error.splitlines()[-1]
    assert last.startswith("publish")
    assert "127.0.0.1:1" in last
