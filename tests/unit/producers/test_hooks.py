"""What `StepPublisher` makes of steps, and of versions that fail, with a publisher that is none."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal

import pytest
import torch
from torch import nn

from weightbus.bus.errors import BusUnavailable, SettingInvalid
from weightbus.bus.settings import BusSettings
from weightbus.producers.errors import (
    NotServed,
    RankInvalid,
    SealFailed,
    TensorInvalid,
    VersionSkipped,
)
from weightbus.producers.fused import Split, Window
from weightbus.producers.integrations.hooks import StepOptions, StepPublisher, step_publisher
from weightbus.producers.shards import Part
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import EngineState


class FakePublication:
    """Ends as it is told."""

    def __init__(self, version: int, error: Exception | None) -> None:
        self._version, self._error = version, error

    def result(self) -> CheckpointReady:
        if self._error is not None:
            raise self._error
        return CheckpointReady(
            model="m", version=self._version, producer="p", created_ns=0, files=("/w",)
        )


class FakePublisher:
    """Keeps what it is given; `at_once` and `later` say which versions fail, and how."""

    model = "m"

    def __init__(self, newest: int = -1) -> None:
        self.newest = newest
        self.started: dict[int, tuple[Part, Mapping[str, str]]] = {}
        self.at_once: dict[int, Exception] = {}
        self.later: dict[int, Exception] = {}
        self.at_end: Exception | None = None
        self.ended_by: list[type[BaseException] | None] = []
        self.waited_for: list[tuple[int, float, int]] = []
        self.given_up: list[tuple[int, str]] = []

    def newest_version(self) -> int:
        return self.newest

    def start(self, tensors: Part, version: int, metadata: Mapping[str, str]) -> FakePublication:
        if version in self.at_once:
            raise self.at_once[version]
        self.started[version] = tensors, metadata
        return FakePublication(version, self.later.get(version))

    def give_up(self, version: int, reason: str) -> None:
        self.given_up.append((version, reason))

    def wait_until_served(
        self, version: int, *, timeout_s: float, engines: int
    ) -> tuple[EngineState, ...]:
        self.waited_for.append((version, timeout_s, engines))
        return ()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.ended_by.append(kind)
        if self.at_end is not None:
            raise self.at_end


Make = Callable[..., StepPublisher]


@pytest.fixture
def publisher() -> FakePublisher:
    return FakePublisher()


@pytest.fixture
def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_steps_are_the_versions_and_stand_in_the_metadata(
    publisher: FakePublisher, net: nn.Module
) -> None:
    on_step_end = StepPublisher(publisher, StepOptions(metadata={"run": "a"}))
    assert [on_step_end(net, step) for step in (1, 2, 5)] == [1, 2, 5]
    assert [metadata for _, metadata in publisher.started.values()] == [
        {"run": "a", "step": str(step)} for step in (1, 2, 5)
    ]
    part, _ = publisher.started[5]
    assert [spec.name for spec in part.layout.tensors] == ["weight", "bias"]


def test_only_some_steps_are_published_when_so_told(
    publisher: FakePublisher, net: nn.Module
) -> None:
    on_step_end = StepPublisher(publisher, StepOptions(every=3))
    assert [on_step_end(net, step) for step in range(7)] == [0, None, None, 3, None, None, 6]
    assert on_step_end.publish(net, 7) == 7
    assert list(publisher.started) == [0, 3, 6, 7]


@pytest.mark.parametrize(
    ("newest", "steps", "versions"),
    [
        (57, (51, 52, 53, 60), (58, 59, 60, 67)),
        (50, (51, 52), (51, 52)),
        (-1, (4, 5, 5, 6), (4, 5, 6, 7)),
        (-1, (1, 2, 3, 1, 2), (1, 2, 3, 4, 5)),
        (3, (0, 1, 8), (4, 5, 12)),
        (-1, (-2, -1, 0), (0, 1, 2)),
    ],
)
def test_versions_grow_when_steps_do_not(
    net: nn.Module, newest: int, steps: tuple[int, ...], versions: tuple[int, ...]
) -> None:
    publisher = FakePublisher(newest)
    on_step_end = StepPublisher(publisher, StepOptions())
    assert tuple(on_step_end(net, step) for step in steps) == versions


def test_version_is_counted_once_it_is_known_to_be_announced(
    publisher: FakePublisher, net: nn.Module
) -> None:
    with StepPublisher(publisher, StepOptions()) as on_step_end:
        on_step_end(net, 1)
        assert on_step_end.published == 0
        on_step_end(net, 2)
        assert on_step_end.published == 1
    assert (on_step_end.published, publisher.ended_by) == (2, [None])


@pytest.mark.parametrize("on_error", ["raise", "warn"])
@pytest.mark.parametrize("when", ["at_once", "later"])
def test_skipped_version_does_not_end_training(
    publisher: FakePublisher,
    net: nn.Module,
    caplog: pytest.LogCaptureFixture,
    when: str,
    on_error: Literal["raise", "warn"],
) -> None:
    getattr(publisher, when)[2] = VersionSkipped(2, "engine e reads version 0")
    with (
        caplog.at_level(logging.WARNING),
        StepPublisher(publisher, StepOptions(on_error=on_error)) as on_step_end,
    ):
        for step in (1, 2, 3):
            on_step_end(net, step)
    assert caplog.messages == [
        "step 2: version 2 is skipped: engine e reads version 0 (1 skipped, 1 published)"
    ]
    counts = on_step_end.published, on_step_end.skipped, on_step_end.failed
    assert counts == (2, 1, 0)


def test_failure_is_raised_when_the_version_is_published(
    publisher: FakePublisher, net: nn.Module
) -> None:
    publisher.at_once[2] = BusUnavailable("nowhere", "gone")
    on_step_end = StepPublisher(publisher, StepOptions())
    on_step_end(net, 1)
    with pytest.raises(BusUnavailable):
        on_step_end(net, 2)
    assert (on_step_end.published, on_step_end.failed) == (1, 1)
    assert on_step_end(net, 3) == 3


def test_failure_in_the_background_is_raised_at_the_next_version_and_not_between(
    publisher: FakePublisher, net: nn.Module
) -> None:
    publisher.later[2] = SealFailed(2, "rank 1 gave up")
    on_step_end = StepPublisher(publisher, StepOptions(every=2))
    on_step_end(net, 2)
    on_step_end(net, 3)
    with pytest.raises(SealFailed):
        on_step_end(net, 4)
    assert 4 not in publisher.started
    assert on_step_end(net, 6) == 6
    on_step_end.close()
    assert (on_step_end.published, on_step_end.failed) == (1, 1)


def test_failure_of_the_last_version_is_raised_at_the_end_which_comes_all_the_same(
    publisher: FakePublisher, net: nn.Module
) -> None:
    publisher.later[1] = SealFailed(1, "rank 1 gave up")
    on_step_end = StepPublisher(publisher, StepOptions())
    on_step_end(net, 1)
    with pytest.raises(SealFailed):
        on_step_end.close()
    assert publisher.ended_by == [None]


def test_failures_are_warned_about_with_numbers_when_so_told(
    publisher: FakePublisher, net: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    publisher.at_once[1] = BusUnavailable("nowhere", "gone")
    publisher.later[2] = SealFailed(2, "rank 1 gave up")
    publisher.at_end = BusUnavailable("nowhere", "gone")
    with (
        caplog.at_level(logging.WARNING),
        StepPublisher(publisher, StepOptions(on_error="warn")) as on_step_end,
    ):
        assert [on_step_end(net, step) for step in (1, 2, 3)] == [None, 2, 3]
    assert (on_step_end.published, on_step_end.failed) == (1, 2)
    first, second, end = caplog.messages
    assert "step 1 was not published as version 1: BusUnavailable" in first
    assert "(1 failed so far)" in first
    assert "rank 1 gave up" in second
    assert "did not end well" in end


def test_what_is_no_error_of_ours_is_never_taken_for_a_warning(publisher: FakePublisher) -> None:
    on_step_end = StepPublisher(publisher, StepOptions(on_error="warn"))
    publisher.at_once[1] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        on_step_end({"w": torch.ones(1)}, 1)


def test_what_was_announced_last_is_waited_for_when_later_versions_were_not(
    publisher: FakePublisher, net: nn.Module
) -> None:
    publisher.newest = 7
    publisher.later[10] = VersionSkipped(10, "engine e reads version 8")
    publisher.later[11] = SealFailed(11, "rank 1 gave up")
    on_step_end = StepPublisher(publisher, StepOptions())
    on_step_end.wait_until_served(timeout_s=1)
    on_step_end(net, 8)
    on_step_end.wait_until_served(timeout_s=2, engines=3)
    for step in (9, 10):
        on_step_end(net, step)
    on_step_end.wait_until_served(timeout_s=1)
    on_step_end(net, 11)
    with pytest.raises(NotServed, match="version 11 of m is not served: step 11 was not published"):
        on_step_end.wait_until_served(timeout_s=1)
    assert publisher.waited_for == [(7, 1, 1), (8, 2, 3), (9, 1, 1)]


def test_failure_is_raised_at_the_next_version_also_where_it_was_waited_for(
    publisher: FakePublisher, net: nn.Module
) -> None:
    publisher.later[1] = failure = SealFailed(1, "rank 1 gave up")
    on_step_end = StepPublisher(publisher, StepOptions())
    on_step_end(net, 1)
    for _ in range(2):
        with pytest.raises(NotServed) as raised:
            on_step_end.wait_until_served(timeout_s=1)
        assert raised.value.__cause__ is failure
    with pytest.raises(SealFailed):
        on_step_end(net, 2)
    assert 2 not in publisher.started
    assert on_step_end(net, 3) == 3
    assert (on_step_end.failed, publisher.waited_for) == (1, [])


def test_version_is_given_up_when_it_cannot_be_planned(publisher: FakePublisher) -> None:
    on_step_end = StepPublisher(publisher, StepOptions(on_error="warn"))
    assert on_step_end({"w": torch.zeros(3).to_sparse()}, 4) is None
    ((version, reason),) = publisher.given_up
    assert version == 4
    assert reason.startswith("TensorInvalid: tensor w")


@pytest.mark.parametrize("newest", [57, 58])
def test_versions_go_on_from_what_the_ranks_agree_on(net: nn.Module, newest: int) -> None:
    publisher = FakePublisher(newest)
    on_step_end = StepPublisher(
        publisher, StepOptions(), world_size=2, agree=lambda mine: max(mine, 58)
    )
    assert [on_step_end(net, step) for step in (50, 51)] == [59, 60]


AGREE = """
import sys
from torch import distributed
from weightbus.producers.integrations import hooks
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
assert [hooks._is_group_of(size) for size in (1, 2, 3)] == [False, True, False]
print(hooks._greatest(57 + rank))
distributed.destroy_process_group()
"""


def test_ranks_agree_on_the_newest_version_of_all(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", AGREE, str(rank), str(tmp_path / "group")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ["58", "58"]


def test_publisher_ends_without_lingering_when_training_fails(
    publisher: FakePublisher, net: nn.Module
) -> None:
    publisher.later[1] = SealFailed(1, "rank 1 gave up")
    on_step_end = StepPublisher(publisher, StepOptions())
    on_step_end(net, 1)
    with pytest.raises(ZeroDivisionError), on_step_end:
        raise ZeroDivisionError
    assert publisher.ended_by == [ZeroDivisionError]


def test_publisher_is_closed_when_the_newest_version_cannot_be_had() -> None:
    class Deaf(FakePublisher):
        def newest_version(self) -> int:
            raise BusUnavailable("nowhere", "gone")

    deaf = Deaf()
    with pytest.raises(BusUnavailable):
        StepPublisher(deaf, StepOptions())
    assert deaf.ended_by == [BusUnavailable]


def test_module_is_published_as_the_options_say(publisher: FakePublisher) -> None:
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.BatchNorm1d(4))

    def split_of(module: nn.Module) -> Split:
        assert module is net

        def split(name: str, shape: tuple[int, ...]) -> tuple[Window, ...] | None:
            if name != "0.weight":
                return None
            halves = (("up", 0), ("gate", 2))
            return tuple(Window(half, (2, 2), (row, 0), (2, 2), (0, 0)) for half, row in halves)

        return split

    options = StepOptions(dtype=torch.bfloat16, buffers="none", split_of=split_of)
    StepPublisher(publisher, options)(net, 1)
    part, _ = publisher.started[1]
    assert [(spec.name, spec.dtype, spec.shape) for spec in part.layout.tensors] == [
        ("up", "BF16", (2, 2)),
        ("gate", "BF16", (2, 2)),
        ("1.weight", "BF16", (4,)),
        ("1.bias", "BF16", (4,)),
    ]


def test_ranks_that_hold_the_same_module_publish_it_once() -> None:
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    held = []
    for rank in range(2):
        publisher = FakePublisher()
        StepPublisher(publisher, StepOptions(), rank=rank, world_size=2)(net, 1)
        part, _ = publisher.started[1]
        held.append({part.layout.tensors[shard.tensor].name for shard in part.layout.shards})
    assert all(held)
    assert not held[0] & held[1]
    assert held[0] | held[1] == set(net.state_dict())


def test_plan_is_kept_until_a_parameter_lies_elsewhere_when_so_told(
    publisher: FakePublisher, net: nn.Linear
) -> None:
    on_step_end = StepPublisher(publisher, StepOptions(plan_once=True))
    on_step_end(net, 1)
    with torch.no_grad():
        net.weight += 1
    on_step_end(net, 2)
    net.weight.data = torch.full((2, 3), 5.0)
    on_step_end(net, 3)
    first, second, third = (part for part, _ in publisher.started.values())
    assert first is second
    assert torch.equal(third.sources[0], torch.full((2, 3), 5.0))
    on_step_end(nn.Linear(3, 2), 4)
    assert publisher.started[4][0] is not third


def test_plan_is_made_anew_for_every_version_and_holds_no_memory_between(
    publisher: FakePublisher, net: nn.Module
) -> None:
    on_step_end = StepPublisher(publisher, StepOptions())
    on_step_end(net, 1)
    held = weakref.ref(publisher.started.pop(1)[0])
    on_step_end(net, 2)
    gc.collect()
    assert held() is None


def test_state_dict_is_published_in_the_wanted_dtype(publisher: FakePublisher) -> None:
    on_step_end = StepPublisher(publisher, StepOptions(dtype=torch.bfloat16))
    on_step_end({"w": torch.ones(2), "n": torch.ones(2, dtype=torch.int64)}, 1)
    part, _ = publisher.started[1]
    assert [spec.dtype for spec in part.layout.tensors] == ["BF16", "I64"]


def test_what_cannot_be_published_is_refused_by_name(publisher: FakePublisher) -> None:
    on_step_end = StepPublisher(publisher, StepOptions())
    with pytest.raises(TensorInvalid, match="w is"):
        on_step_end({"w": torch.ones(1, device="meta")}, 1)


def test_rank_that_cannot_know_of_the_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = BusSettings(url="nats://127.0.0.1:1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(RankInvalid, match=r"rank is 2: of 4 ranks.*not initialised"):
        step_publisher(settings, "m")
    with pytest.raises(RankInvalid, match="give both"):
        step_publisher(settings, "m", rank=1)


def test_ranks_without_a_bus_that_they_share_are_refused() -> None:
    with pytest.raises(SettingInvalid, match=r"url.*all 2 ranks"):
        step_publisher(BusSettings(), "m", rank=0, world_size=2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (StepOptions(every=0), "every"),
        (StepOptions(on_error="ignore"), "on_error"),  # type: ignore[arg-type]
        (StepOptions(buffers="some"), "buffers"),  # type: ignore[arg-type]
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options: StepOptions, named: str) -> None:
    with pytest.raises(SettingInvalid, match=named):
        step_publisher(BusSettings(url="nats://127.0.0.1:1"), "m", steps=options)
