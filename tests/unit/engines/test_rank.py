"""The loop of one rank, whose worker is asked by a consumer, as a thread of this process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from weightbus.consumers.engines.channel import open_channel
from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.torch.host import TorchModelHost
from weightbus.consumers.engines.torch.models import build_model
from weightbus.consumers.engines.torch.rank import Rank
from weightbus.consumers.engines.torch.words import RankWords
from weightbus.consumers.errors import DeviceLost
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.schemas.worker import (
    Apply,
    Failed,
    InPlace,
    Inspect,
    Inspected,
    WorkerReply,
    WorkerRequest,
)

pytestmark = pytest.mark.anyio

DEADLINE_S = 30.0
CONFIG = {"vocab_size": 10, "num_hidden_layers": 1}


class LosingWorker(ReloadWorker):
    """Loses its device in the first update."""

    def handle(self, request: WorkerRequest) -> WorkerReply:
        if isinstance(request, Apply):
            self._lost = DeviceLost("cuda:0", "an illegal memory access was encountered")
        return super().handle(request)


@contextmanager
def running_rank(place: EngineDirectory, words: RankWords) -> Iterator[list[BaseException]]:
    """A rank that serves; what it ended with. It may outlive a test that fails."""
    model = build_model("decoder", CONFIG)
    host = TorchModelHost("decoder", lambda: build_model("decoder", CONFIG), model)
    rank = Rank(place, host, LosingWorker(host, 0, 1), words)
    ended: list[BaseException] = []

    def run() -> None:
        try:
            rank.run(os.getppid())
        except DeviceLost as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        thread.join(DEADLINE_S)
    assert not thread.is_alive()


async def test_rank_answers_and_ends_when_its_device_is_lost(short_path: Path) -> None:
    """The front finds it dead, as it finds any rank that has died."""
    place = EngineDirectory(short_path)
    place.prepare()
    words = RankWords.create(0)
    try:
        with running_rank(place, words) as ended:
            async with open_channel(place.control, 1, (Inspected, Failed)) as channel:
                alive = Inspect(request=0, layout_digest=None, deadline_s=DEADLINE_S)
                assert isinstance(await channel.request(0, alive, DEADLINE_S), Inspected)
                update = Apply(
                    request=0,
                    version=1,
                    layout_digest="0" * 64,
                    feed=InPlace(sources=()),
                    deadline_s=DEADLINE_S,
                )
                failed = await channel.request(0, update, DEADLINE_S)
        assert isinstance(failed, Failed)
        assert failed.error == "DeviceLost"
        assert failed.reason.startswith("device cuda:0 is lost to this process: an illegal")
        assert [type(error) for error in ended] == [DeviceLost]
    finally:
        words.close()
