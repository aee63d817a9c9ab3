"""A plain function that publishes a model after a step: for verl, OpenRLHF and loops of one's own.

`on_step_end = step_publisher(...)` on every rank, then `on_step_end(model, step)` on every rank.
Owns a `BlockingPublisher`, and waits for nothing but what that waits for: a call returns as soon as
the trainer may change its weights, and what became of the version is known at the next one.
Invariants: whatever the steps do (a run that resumes, a second run, a step that is published
twice), versions grow, and are the same on every rank of `torch.distributed` (without it, ranks
whose steps differ come to `SealFailed`); a failure is raised at the same step on every rank that
has heard of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol, Self, get_args
from weakref import WeakKeyDictionary

import torch
from torch import distributed, nn

from weightbus.bus.errors import SettingInvalid
from weightbus.bus.settings import BusSettings
from weightbus.producers.blocking import BlockingPublisher
from weightbus.producers.ending import Ending
from weightbus.producers.errors import NotServed, RankInvalid, VersionSkipped
from weightbus.producers.fused import Split
from weightbus.producers.modules import Buffers, plan_module
from weightbus.producers.publisher import PublisherOptions
from weightbus.producers.shards import Cast, Part, Tensors, plan_part
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.progress import EngineState
from weightbus.tracing.otlp import OtlpSettings
from weightbus.tracing.telemetry import Telemetry

__all__ = ("Pending", "StepOptions", "StepPublisher", "Stepped", "step_publisher")

_logger = logging.getLogger(__name__)

OnError = Literal["raise", "warn"]

Stepped = nn.Module | Part | Tensors
"""What a step leaves behind: a module, or what `BlockingPublisher.publish` takes."""


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What of a model is published, after which steps, and what a failure does."""

    every: int = 1
    """After which steps: those that it divides."""
    dtype: Cast | None = None
    """What floating point tensors are cast to while they are copied, all or each by its name in the
    checkpoint; None: to nothing."""
    buffers: Buffers = "persistent"
    """Of a module: those that its `state_dict` has, or none."""
    split_of: Callable[[nn.Module], Split | None] | None = None
    """Called once for a module: how tensors that it has fused are cut into the checkpoint's; None:
    they are not. `weightbus.producers.huggingface.split_of` knows the models of transformers."""
    plan_once: bool = False
    """Keep the plan of a module, which takes 10 to 50 us for each of the checkpoint's tensors to
    make, until a parameter or buffer lies in other memory than before. It holds the memory that it
    was made of: not for trainers that move parameters to the host and back between steps."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What every version says beside its `step`; of rank 0."""
    on_error: OnError = "raise"
    """What a version that fails does to training: ends it, or is warned about. A version that is
    skipped, as `PublisherOptions.when_busy` may have it, never ends it."""
    ends_on_sigterm: bool = True
    """SIGTERM, by which launchers end the other ranks once one has died, gives up the coming
    version and raises `SystemExit`, unless the trainer handles it: see `producers.ending`."""


def _own(newest: int) -> int:
    """Of a rank that is alone, or has no collective to ask the others by."""
    return newest


class Pending(Protocol):
    """A version that is being published: `blocking.Publication`."""

    def result(self) -> CheckpointReady: ...


class Publishing(Protocol):
    """What this module needs of a `BlockingPublisher`."""

    @property
    def model(self) -> str: ...

    def newest_version(self) -> int: ...

    def start(self, tensors: Part, version: int, metadata: Mapping[str, str]) -> Pending: ...

    def give_up(self, version: int, reason: str) -> None: ...

    def wait_until_served(
        self, version: int, *, timeout_s: float, engines: int
    ) -> tuple[EngineState, ...]: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def step_publisher(
    settings: BusSettings,
    model: str,
    *,
    producer: str = "trainer",
    rank: int | None = None,
    world_size: int | None = None,
    telemetry: Telemetry | None = None,
    otlp: OtlpSettings | None = None,
    options: PublisherOptions | None = None,
    steps: StepOptions | None = None,
) -> StepPublisher:
    """Connect to the bus; what comes back is called after every step, as `on_step_end`.

    Called on every rank, once its weights are in place. `rank` and `world_size` are those of
    `torch.distributed` if they are not given: of all ranks that hold a part of the model. Where it
    has as many ranks this is a collective: they agree on the version to go on from. Every rank
    calls `on_step_end` for the same steps, also where it has nothing of its own to publish.

    Raises:
        RankInvalid: one of the two is missing, or there is no such rank, or this is one of several
            ranks and `torch.distributed` is not yet initialised.
        SettingInvalid: several ranks, but `settings` name no bus; or `steps` or `options` make no
            sense.
        What `BlockingPublisher` raises.
    """
    steps = steps or StepOptions()
    _check(steps)
    rank, world_size = _ranks(rank, world_size)
    if world_size > 1 and settings.url is None:
        limit = f"must be the server that all {world_size} ranks connect to"
        raise SettingInvalid("url", settings.url, limit)
    publisher = BlockingPublisher(
        settings,
        model,
        producer=producer,
        rank=rank,
        world_size=world_size,
        telemetry=telemetry,
        otlp=otlp,
        options=options,
    )
    agree = _greatest if _is_group_of(world_size) else _own
    stepping = StepPublisher(publisher, steps, rank=rank, world_size=world_size, agree=agree)
    if steps.ends_on_sigterm:
        stepping.end_on_sigterm()
    return stepping


class StepPublisher:
    """What `step_publisher` makes. Called in the thread that trains; ended by `close` or `with`."""

    def __init__(
        self,
        publisher: Publishing,
        steps: StepOptions,
        *,
        rank: int = 0,
        world_size: int = 1,
        agree: Callable[[int], int] = _own,
    ) -> None:
        """Takes over `publisher`, and asks it for the newest version.

        `agree` makes of each rank's newest version one, the same on all ranks and no less.

        Raises:
            BusUnavailable, BusTimeout, RequestRefused: and closes it.
        """
        self._publisher, self._steps = publisher, steps
        self._rank, self._world_size = rank, world_size
        self._pending: tuple[int, int, Pending] | None = None
        self._splits: WeakKeyDictionary[nn.Module, Split | None] = WeakKeyDictionary()
        self._planned: tuple[Sequence[object], Part] | None = None
        self._shift = 0
        self._untold: WeightBusError | None = None
        """Of a version before: the other ranks raise it at the next."""
        try:
            self._newest = agree(publisher.newest_version())
        except BaseException as error:
            publisher.__exit__(type(error), error, error.__traceback__)
            raise
        self.published = 0
        """Versions that are known to be announced. The last one's end is known at the next."""
        self.skipped = 0
        """Versions that were skipped, since engines were busy."""
        self.failed = 0
        """Versions that were not announced because of an error."""
        self.last_step: int | None = None
        """That was published, or tried."""
        self._announced = self._newest
        self._ending: Ending | None = None

    def __call__(self, model: Stepped, step: int) -> int | None:
        """`publish`, if `step` is one of those to be published."""
        version = None if step % self._steps.every else self.publish(model, step)
        self._expect_after(step)
        return version

    def end_on_sigterm(self) -> None:
        """From here to the end: see `producers.ending`. To be called in the main thread."""
        self._ending = Ending(self._publisher, self._newest + 1)

    def publish(self, model: Stepped, step: int) -> int | None:
        """Publish what `step` has made of `model`; returns its version, None: it was not started.

        The version is the step. If that is not greater than every version before (a run that
        resumed from an older step, or begins again), it is the next one, and those of later steps
        go on from there; the step stands in its metadata. Every rank calls it. Where PEFT has
        adapters that are sharded, this is a collective.

        Raises:
            What `BlockingPublisher.start` and `plan_module` raise, unless `on_error` is "warn": of
            this version before its tensors are copied, of the version before from there on.
        """
        self._settle()
        version = self._next(step)
        metadata = {**self._steps.metadata, "step": str(step)}
        try:
            part = self._plan_or_give_up(model, version)
            pending = self._publisher.start(part, version, metadata)
        except WeightBusError as error:
            self._judge(error, step, version)
            return None
        self._pending = step, version, pending
        self._expect_after(step)
        return version

    def wait_until_served(self, *, timeout_s: float, engines: int = 1) -> tuple[EngineState, ...]:
        """Until all present engines, at least `engines` of them, serve what was announced last.

        For loops that generate with the weights of the step before, and no older. Any rank may call
        it; one is enough, if the others wait for it.

        Raises:
            NotServed: after `timeout_s`, which begins when the last version is announced; or the
                last version has failed, which is its cause, unless `on_error` is "warn". That is
                raised on this rank, too, at the next version.
            BusUnavailable, BusTimeout, RequestRefused
        """
        try:
            self._settle()
        except WeightBusError as error:
            self._untold = error
            reason = f"step {self.last_step} was not published: {type(error).__name__}: {error}"
            raise NotServed(
                self._publisher.model, self._newest, {}, 0, engines, 0.0, reason
            ) from error
        return self._publisher.wait_until_served(
            self._announced, timeout_s=timeout_s, engines=engines
        )

    def close(self) -> None:
        """Wait for the last version to be announced, and end well: see `BlockingPublisher.close`.

        Raises:
            What became of the last version, and what `BlockingPublisher.close` raises, unless
            `on_error` is "warn".
        """
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._planned = None
        if self._ending is not None:
            self._ending.close()
        if kind is not None:
            self._publisher.__exit__(kind, error, traceback)
            return
        try:
            self._settle()
        finally:
            try:
                self._publisher.__exit__(None, None, None)
            except WeightBusError as ended:
                if self._steps.on_error == "raise":
                    raise
                _logger.warning("the publisher did not end well: %s", ended)

    def _plan_or_give_up(self, model: Stepped, version: int) -> Part:
        """The other ranks may wait for this one's part by now."""
        try:
            return self._plan(model)
        except Exception as error:
            with suppress(WeightBusError):  # of two errors the first
                self._publisher.give_up(version, f"{type(error).__name__}: {error}")
            raise

    def _plan(self, model: Stepped) -> Part:
        if isinstance(model, Part):
            return model
        if not isinstance(model, nn.Module):
            return plan_part(model, dtype=self._steps.dtype)
        if not self._steps.plan_once:
            return self._plan_module(model)
        memory = _memory_of(model)
        if self._planned is None or self._planned[0] != memory:
            part = self._plan_module(model)
            self._planned = _memory_of(model), part
            if part.prepared:  # adapters can be put to other use without a sign of it here
                self._planned = None
            return part
        return self._planned[1]

    def _plan_module(self, model: nn.Module) -> Part:
        if model not in self._splits:
            split_of = self._steps.split_of
            self._splits[model] = None if split_of is None else split_of(model)
        return plan_module(
            model,
            rank=self._rank,
            world_size=self._world_size,
            dtype=self._steps.dtype,
            buffers=self._steps.buffers,
            split=self._splits[model],
        )

    def _next(self, step: int) -> int:
        """The same on every rank: they have agreed on the newest version, and have counted since.

        A rank never asks again by itself, also where the version proves to be another publisher's:
        that fails on all ranks.
        """
        if step + self._shift <= self._newest:
            self._shift = self._newest + 1 - step
            _logger.info(
                "step %d is published as version %d: there is a version %d already",
                step,
                step + self._shift,
                self._newest,
            )
        self._newest = step + self._shift
        self.last_step = step
        return self._newest

    def _expect_after(self, step: int) -> None:
        """The version that is given up where SIGTERM comes before it: the same on every rank."""
        if self._ending is not None:
            coming = step // self._steps.every * self._steps.every + self._steps.every
            self._ending.coming = max(coming + self._shift, self._newest + 1)

    def _settle(self) -> None:
        """What became of the version before, which ends by deadlines of its own.

        The next could not be written sooner, and so every rank learns of a failure at the same
        step, before it begins a collective.
        """
        if self._untold is not None:
            error, self._untold = self._untold, None
            raise error
        if self._pending is None:
            return
        step, version, pending = self._pending
        try:
            pending.result()
        except WeightBusError as error:
            self._pending = None
            self._judge(error, step, version)
        else:
            self._pending = None
            self._announced = version
            self.published += 1

    def _judge(self, error: WeightBusError, step: int, version: int) -> None:
        """To be called while `error` is handled."""
        if isinstance(error, VersionSkipped):
            self.skipped += 1
            level = logging.WARNING if self._rank == 0 else logging.INFO
            counts = self.skipped, self.published
            _logger.log(level, "step %d: %s (%d skipped, %d published)", step, error, *counts)
            return
        self.failed += 1
        if self._steps.on_error == "raise":
            raise error
        _logger.warning(
            "step %d was not published as version %d: %s: %s (%d failed so far)",
            step,
            version,
            type(error).__name__,
            error,
            self.failed,
        )


def _greatest(newest: int) -> int:
    """Of all ranks' newest versions: a collective, where the group's backend has its tensors."""
    on_host = "cpu:" in distributed.get_backend_config()
    place = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
    greatest = torch.tensor([newest], dtype=torch.int64, device=place)
    distributed.all_reduce(greatest, op=distributed.ReduceOp.MAX)
    return int(greatest.item())


def _is_group_of(world_size: int) -> bool:
    if world_size == 1 or not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() == world_size


def _memory_of(model: nn.Module) -> Sequence[object]:
    """Where everything lies that a plan of `model` depends on; of a `DTensor` what is here."""
    return [
        (name, tensor.shape, tensor.dtype, local.data_ptr(), local.shape, local.stride())
        for tensors in (model.named_parameters, model.named_buffers)
        for name, tensor in tensors(remove_duplicate=False)
        for local in (getattr(tensor, "_local_tensor", tensor),)
    ]


def _check(steps: StepOptions) -> None:
    if steps.every < 1:
        raise SettingInvalid("every", steps.every, "must be at least 1")
    for name, value, known in (
        ("on_error", steps.on_error, get_args(OnError)),
        ("buffers", steps.buffers, get_args(Buffers)),
    ):
        if value not in known:
            raise SettingInvalid(name, value, f"must be one of {', '.join(known)}")


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if rank is not None and world_size is not None:
        return rank, world_size
    if rank is not None or world_size is not None:
        raise RankInvalid(rank or 0, f"of {world_size} ranks: give both, or neither")
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    launched = os.environ.get("WORLD_SIZE", "1")
    if launched != "1":  # by torchrun: alone, every rank would take itself for the only one
        limit = (
            f"of {launched} ranks, by WORLD_SIZE, but torch.distributed is not initialised: "
            "initialise it first, or give rank and world_size"
        )
        raise RankInvalid(int(os.environ.get("RANK", "0")), limit)
    return 0, 1
