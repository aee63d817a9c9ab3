"""Devices that fail: what is told, when, and who must not be asked again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.reload.models import Bag, ModuleHost, load_by_name, random_tensor
from tests.unit.transfer.publishing import HOST, Trainer, cut_layout, open_trainer
from weightbus.consumers.errors import DeviceFailed, DeviceLost, PlanError
from weightbus.consumers.reload.faults import our_error, settle, settling
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.worker import ReloadWorker
from weightbus.schemas.worker import (
    Applied,
    Apply,
    Attach,
    Attached,
    Describe,
    Described,
    Failed,
    InPlace,
    Inspect,
    WorkerReply,
)

DEADLINE_S = 60.0
STICKY = "CUDA error: an illegal memory access was encountered\nFor debugging consider passing ..."


class ElsewhereHost(ModuleHost):
    """Its parameters are on a device that no executor writes to, as far as the worker knows."""

    def __init__(self) -> None:
        super().__init__(lambda: Bag(a=(6, 5), b=(7,)), load_by_name)
        self.on_reload: Callable[[], None] = lambda: None
        self.synchronised = 0
        self.is_lost = False

    @property
    def device(self) -> str:
        return "xpu:0"

    def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
        super().reload(weights, modules)
        self.on_reload()

    def synchronize(self) -> None:
        self.synchronised += 1
        if self.is_lost:
            raise RuntimeError(STICKY)


class TritonError(Exception):
    """As one of Triton's own."""

    __module__ = "triton.runtime.errors"


def make_tensors(seed: int) -> dict[str, torch.Tensor]:
    return {
        "a": random_tensor((6, 5), torch.float32, seed),
        "b": random_tensor((7,), torch.float32, seed + 1),
    }


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    with open_trainer(cut_layout(make_tensors(0)), "memory", tmp_path) as trainer:
        yield trainer


@pytest.fixture
def host() -> ElsewhereHost:
    return ElsewhereHost()


@pytest.fixture
def worker(host: ElsewhereHost, trainer: Trainer) -> Iterator[ReloadWorker]:
    """Attached, without cells."""
    worker = ReloadWorker(host, 0, 1)
    described = worker.handle(
        Describe(
            request=1,
            layout_digest=trainer.layout_digest,
            layout=trainer.layout_blob,
            deadline_s=DEADLINE_S,
        )
    )
    assert isinstance(described, Described), described
    attached = worker.handle(
        Attach(
            request=2,
            layout_digest=trainer.layout_digest,
            needs_digest=described.needs_digest,
            cells=(),
            roots=(),
            host_id=HOST,
            deadline_s=DEADLINE_S,
        )
    )
    assert isinstance(attached, Attached), attached
    yield worker
    worker.close()


def apply(worker: ReloadWorker, trainer: Trainer, version: int) -> WorkerReply:
    return worker.handle(
        Apply(
            request=3,
            version=version,
            layout_digest=trainer.layout_digest,
            feed=InPlace(sources=trainer.publish(make_tensors(version), version)),
            deadline_s=DEADLINE_S,
        )
    )


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def nothing() -> None: ...


def test_device_without_an_executor_is_updated_by_the_engine(
    worker: ReloadWorker, trainer: Trainer
) -> None:
    applied = apply(worker, trainer, 1)
    assert isinstance(applied, Applied), applied
    assert "device of the parameters is xpu:0: nothing writes there yet" in applied.reason
    assert (worker.version, worker.touched, worker.lost) == (1, False, None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "2 GiB"),
        (RuntimeError("CUDA error: invalid argument\nCUDA kernel errors might be"), "argument"),
        (TritonError("out of resource: shared memory"), "shared memory"),
    ],
)
def test_refusal_of_a_device_is_told_as_ours_and_the_worker_goes_on(
    worker: ReloadWorker, trainer: Trainer, host: ElsewhereHost, error: Exception, reason: str
) -> None:
    host.on_reload = failing(error)
    failed = apply(worker, trainer, 1)
    assert isinstance(failed, Failed), failed
    assert (failed.error, failed.touched) == ("DeviceFailed", True)
    assert f"device xpu:0 failed: {type(error).__name__}: " in failed.reason
    assert reason in failed.reason
    assert "\n" not in failed.reason
    assert worker.lost is None
    host.on_reload = nothing
    assert isinstance(apply(worker, trainer, 2), Applied)
    assert (worker.version, worker.touched) == (2, False)


def test_device_is_waited_for_before_a_failure_is_told(
    worker: ReloadWorker, trainer: Trainer, host: ElsewhereHost
) -> None:
    """What was queued may still read the segments and write the parameters."""
    before = host.synchronised
    host.on_reload = failing(ValueError("a fault of the engine's"))
    failed = apply(worker, trainer, 1)
    assert isinstance(failed, Failed), failed
    assert (failed.error, failed.reason) == ("ValueError", "a fault of the engine's")
    assert host.synchronised > before


def test_worker_whose_device_is_lost_says_so_to_everything_it_is_asked(
    worker: ReloadWorker, trainer: Trainer, host: ElsewhereHost
) -> None:
    """The fault of a kernel shows at the end, and in every call after it."""

    def lose() -> None:
        host.is_lost = True

    host.on_reload = lose
    failed = apply(worker, trainer, 1)
    assert isinstance(failed, Failed), failed
    assert (failed.error, failed.touched) == ("DeviceLost", True)
    assert failed.reason.endswith("CUDA error: an illegal memory access was encountered")
    assert worker.lost is not None
    host.is_lost = False  # whatever it says now
    again = worker.handle(Inspect(request=9, layout_digest=None, deadline_s=DEADLINE_S))
    assert isinstance(again, Failed), again
    assert (again.request, again.error, again.touched) == (9, "DeviceLost", True)
    assert worker.version == -1


def test_cpu_is_never_waited_for() -> None:
    class CpuHost(ElsewhereHost):
        @property
        def device(self) -> str:
            return "cpu"

    host = CpuHost()
    settle(host)
    with pytest.raises(ValueError, match="of the caller"), settling(host):
        raise ValueError("of the caller")
    assert host.synchronised == 0


def test_lost_device_takes_the_place_of_the_error_that_showed_it(host: ElsewhereHost) -> None:
    host.is_lost = True
    with pytest.raises(DeviceLost, match="illegal memory access") as raised, settling(host):
        raise ValueError("one of its consequences")
    assert raised.value.device == "xpu:0"
    assert isinstance(raised.value.__context__, RuntimeError)


def test_errors_that_are_no_device_s_are_told_as_they_are() -> None:
    ours = PlanError("thing", 1, "limit")
    assert our_error(ours, "cuda:0") is ours
    other = KeyError("CUDA")
    assert our_error(other, "cuda:0") is other
    on_cpu = RuntimeError("CUDA error: there is none here")
    assert our_error(on_cpu, "cpu") is on_cpu
    assert isinstance(our_error(on_cpu, "cuda:1"), DeviceFailed)
