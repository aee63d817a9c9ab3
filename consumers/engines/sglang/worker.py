"""Our end in one of SGLang's workers: the scheduler process of one tensor-parallel rank.

Owns the rank's `TurnTaker`. Everything here is called on the scheduler's main thread, between two
of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import nn

from weightbus.consumers.engines.sglang.payload import SglangTurn
from weightbus.consumers.engines.taking import TurnTaker
from weightbus.consumers.errors import DeviceLost, PlanError
from weightbus.consumers.reload.host import ModelHost

__all__ = ("Place", "SglangWorker", "device_of", "place_in_engine")


class Place(NamedTuple):
    """Where a worker is in its engine."""

    rank: int
    """Of tensor parallelism, the only one that is supported."""
    world_size: int


class SglangWorker:
    """One rank's end. Not thread-safe."""

    def __init__(
        self,
        model: nn.Module,
        make_host: Callable[[nn.Module, Place], ModelHost] | None = None,
        place: Place | None = None,
    ) -> None:
        """
        Args:
            model: the one that serves.
            make_host: called when a request first needs it; None: a `SglangHost`.
            place: None: what SGLang says.
        """
        self.model = model
        self._device = device_of(model)
        where = place or place_in_engine()
        make = make_host or _make_host
        self._taker = TurnTaker(lambda: make(model, where), where.rank, where.world_size)

    @property
    def lost(self) -> DeviceLost | None:
        """Not None: the device does nothing for this process any more, which has to end."""
        return self._taker.lost

    def take(self, message: str) -> None:
        """Carry out the request that a turn names, and reply to its consumer.

        What was computed before may still run on the device: it is waited for, since SGLang starts
        a pass before it looks at the results of the last one.

        Raises:
            PlanError: the message is no turn, or not one for as many ranks as there are.
            EngineUnavailable: there is no such directory, or it is not for this user alone.
        """
        try:
            said = msgspec.json.decode(message, type=SglangTurn)
        except msgspec.MsgspecError as error:
            raise PlanError("turn", repr(message[:200]), f"cannot be read: {error}") from None
        self._taker.open(Path(said.directory))
        with self._as_when_loading():
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._taker.take(said.turn)

    def leave(self) -> None:
        """The consumer, once the last reply is handed over. The device is not spoken to."""
        self._taker.disconnect()

    def close(self) -> None:
        self._taker.close()

    @contextmanager
    def _as_when_loading(self) -> Iterator[None]:
        """SGLang runs its loop in inference mode, and loads models outside of it. Tensors that were
        made inside can be written to only there."""
        inside = any(parameter.is_inference() for parameter in self.model.parameters())
        with torch.inference_mode(inside), torch.no_grad():
            yield


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are.

    Raises:
        PlanError: it has none, or they are on several devices.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        named = ", ".join(sorted(map(str, devices))) or "nowhere"
        raise PlanError(f"device of {type(model).__name__}", named, "must be one")
    return devices.pop()


def place_in_engine() -> Place:
    """This process's place, as SGLang says."""
    from sglang.srt.distributed import parallel_state

    return Place(
        int(parallel_state.get_tensor_model_parallel_rank()),
        int(parallel_state.get_tensor_model_parallel_world_size()),
    )


def _make_host(model: nn.Module, place: Place) -> ModelHost:
    from weightbus.consumers.engines.sglang.host import SglangHost

    return SglangHost(model, device_of(model), place.rank == place.world_size - 1)
