"""Our end in a scheduler of SGLang: what it may meet there, and what may not leave it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
import pytest
import torch
from torch import nn

from weightbus.consumers.engines.asking import REPLIES
from weightbus.consumers.engines.channel import open_channel
from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.sglang import loader
from weightbus.consumers.engines.sglang.payload import SglangTurn
from weightbus.consumers.engines.sglang.worker import Place, SglangWorker, device_of
from weightbus.consumers.engines.turns import Turn
from weightbus.consumers.errors import DeviceLost, EngineUnavailable, PlanError
from weightbus.consumers.reload.host import ModelHost
from weightbus.schemas.worker import Failed, Inspect

pytestmark = pytest.mark.anyio

LONG_S = 30.0


def worker_of(model: nn.Module) -> SglangWorker:
    def no_host(model: nn.Module, place: Place) -> ModelHost:
        mode = "inference mode" if torch.is_inference_mode_enabled() else "no inference mode"
        raise EngineUnavailable("model", f"made in {mode}")

    return SglangWorker(model, no_host, Place(0, 1))


def message(directory: Path, number: int, wait_s: float = LONG_S) -> str:
    turn = Turn(numbers=(number,), wait_s=wait_s)
    return msgspec.json.encode(SglangTurn(directory=str(directory), turn=turn)).decode()


@pytest.fixture
def place(short_path: Path) -> EngineDirectory:
    place = EngineDirectory(short_path / "engine")
    place.prepare()
    return place


@pytest.fixture
def left_alone() -> Iterator[None]:
    """The loader's worker, which lives as long as the process."""
    loader._worker = None
    yield
    loader._worker = None


@pytest.mark.parametrize("made_inside", [False, True])
async def test_request_is_carried_out_in_the_mode_that_the_model_was_made_in(
    place: EngineDirectory, made_inside: bool
) -> None:
    """SGLang's loop runs in inference mode, its loading does not."""
    with torch.inference_mode(made_inside):
        model = nn.Linear(2, 2)
    worker = worker_of(model)
    async with open_channel(place.control, 1, REPLIES) as channel:
        number = channel.next_number()

        def take() -> None:
            with torch.inference_mode():
                worker.take(message(place.path, number))
            worker.close()

        outcome: list[object] = []

        async def ask() -> None:
            request = Inspect(request=0, deadline_s=LONG_S)
            outcome.append(await channel.request(0, request, LONG_S, number=number))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            tasks.start_soon(anyio.to_thread.run_sync, take)
    (reply,) = outcome
    assert isinstance(reply, Failed)
    expected = "made in inference mode" if made_inside else "made in no inference mode"
    assert expected in reply.reason


def test_turn_is_refused_when_it_cannot_be_read(place: EngineDirectory) -> None:
    worker = worker_of(nn.Linear(2, 2))
    with pytest.raises(PlanError, match="turn is"):
        worker.take('{"directory": "/tmp"}')


def test_turn_is_refused_when_its_directory_is_open_to_others(place: EngineDirectory) -> None:
    place.path.chmod(0o755)
    worker = worker_of(nn.Linear(2, 2))
    with pytest.raises(EngineUnavailable, match="0755"):
        worker.take(message(place.path, 1, wait_s=0))


def test_model_on_several_devices_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(PlanError, match="cpu, meta"):
        device_of(model)


@pytest.mark.usefixtures("left_alone")
def test_loader_lets_nothing_out_but_says_it_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """There is no SGLang here, so that it does not know its rank: in SGLang's scheduler, an
    exception would end the server."""
    with caplog.at_level(logging.ERROR):
        loader.take_turn(nn.Linear(2, 2), [("not a turn", torch.empty(0))])
    assert "came to nothing" in caplog.text


@pytest.mark.usefixtures("left_alone")
def test_loader_ends_the_process_when_its_device_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Lost(SglangWorker):
        def take(self, message: str) -> None:
            pass

        @property
        def lost(self) -> DeviceLost:
            return DeviceLost("cuda:0", "an illegal address")

    model = nn.Linear(2, 2)
    monkeypatch.setattr(loader, "_worker", Lost(model, None, Place(0, 1)))
    with pytest.raises(DeviceLost):
        loader.take_turn(model, [("turn", torch.empty(0))])
