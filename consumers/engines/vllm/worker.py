"""What the backend and the extension have in common: our end in one of vLLM's workers.

Owns the rank's `TurnTaker`. Everything here is called on the worker's main thread, within a call of
vLLM's own, so nothing runs beside a forward pass; and such a call must not raise (`status.py`).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightbus.consumers.engines.errors import DraftUnknown, EngineAsleep
from weightbus.consumers.engines.taking import TurnTaker
from weightbus.consumers.engines.turns import Turn
from weightbus.consumers.engines.vllm.sleeping import (
    KNOWN_BACKEND,
    are_weights_asleep,
    are_weights_discarded,
    follow_sleep,
    parts_asleep,
)
from weightbus.consumers.engines.vllm.status import WorkerStatus, write_status
from weightbus.consumers.errors import ConsumerError, EngineUnavailable
from weightbus.consumers.reload.host import ModelHost
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.worker import Apply, Inspect, WorkerRequest

__all__ = ("Draft", "HostMaker", "VllmWorker", "drafts_from_checkpoint", "make_vllm_host")

Draft = tuple[nn.Module, Any]
"""A drafter and its `ModelConfig`."""

_logger = logging.getLogger(__name__)


HostMaker = Callable[[Any, nn.Module, torch.device, Draft | None], ModelHost]
"""Makes the host of a `VllmConfig`, its model on a device, and a drafter of the same checkpoint."""


def make_vllm_host(
    vllm_config: Any, model: nn.Module, device: torch.device, draft: Draft | None
) -> ModelHost:
    from weightbus.consumers.engines.vllm.host import VllmHost

    return VllmHost(vllm_config, model, device, draft)


class VllmWorker:
    """One rank's end."""

    def __init__(
        self,
        vllm_config: Any,
        model: nn.Module,
        device: torch.device,
        make_host: HostMaker = make_vllm_host,
    ) -> None:
        self._make = make_host
        self._vllm_config = vllm_config
        self._model = model
        self._device = device
        self._draft: Draft | None = None
        self._directory: Path | None = None
        self._session = False
        self._asleep: tuple[str, ...] = ()
        """As last reported."""
        self._discards = 0
        """How often the weights were discarded."""
        self._are_discarded = False
        """And not woken since."""
        self._needs_draft = drafts_from_checkpoint(vllm_config)
        parallel = vllm_config.parallel_config
        self._taker = TurnTaker(self._make_host, parallel.rank, parallel.world_size, self._refusal)
        follow_sleep(self._note_sleep)
        self._note_sleep()

    def open(self, directory: str) -> None:
        """Connect to the consumer of this directory, and leave our status there. Raises nothing:
        that says why it cannot be."""
        before, self._directory = self._directory, Path(directory)
        copies = self._vllm_config.parallel_config.data_parallel_size
        try:
            if copies > 1:
                raise EngineUnavailable(
                    self._vllm_config.model_config.model,
                    f"it is data parallel ({copies} copies): start each as a server of its own",
                )
            self._check_sleep_mode()
            self._taker.open(self._directory)
        except ConsumerError as error:
            self._report(str(error))
            self._directory = before or self._directory
        else:
            self._report()

    def _check_sleep_mode(self) -> None:
        """
        Raises:
            EngineUnavailable: it can sleep, and it would not be known what it holds then.
        """
        model = self._vllm_config.model_config
        backend = getattr(model, "sleep_mode_backend", KNOWN_BACKEND)
        if getattr(model, "enable_sleep_mode", False) and backend != KNOWN_BACKEND:
            raise EngineUnavailable(
                model.model,
                f"its sleep-mode backend is {backend}, which does not tell whether weights were "
                f"discarded: it must be {KNOWN_BACKEND}, or off",
            )

    def _note_sleep(self) -> None:
        """Something may have fallen asleep, or woken."""
        discarded = are_weights_discarded()
        if discarded and not self._are_discarded:
            self._discards += 1
            self._taker.forget()
        self._are_discarded = discarded
        if self._directory is not None and (discarded or parts_asleep() != self._asleep):
            self._report()

    def note_session(self, is_open: bool) -> None:
        """A session of vLLM's has begun, or ended."""
        self._session = is_open
        if self._directory is not None:
            self._report()

    def _report(self, error: str = "") -> None:
        assert self._directory is not None
        self._asleep = parts_asleep()
        status = WorkerStatus(
            rank=self._taker.rank,
            session=self._session,
            asleep=self._asleep,
            discards=self._discards,
            error=error,
        )
        try:
            write_status(self._directory, status)
        except OSError as failure:
            _logger.error("%s: %s %s", self._directory, failure.strerror, error)

    def show_draft(self, model: nn.Module, model_config: Any) -> None:
        """The drafter, before the first request; later it is of no consequence."""
        self._draft = (model, model_config)

    def take(self, turn: Turn) -> None:
        """See `TurnTaker.take`; raises nothing. If the device is lost, this process ends once that
        is said."""
        self._note_sleep()
        try:
            self._taker.take(turn)
        except ConsumerError as error:  # nobody waits for it, or sees by itself that none came
            _logger.error("turn refused: %s", error)
        lost = self._taker.lost
        if lost is None:
            return
        _logger.critical("%s: this worker ends", lost)
        self._taker.disconnect()  # what is mapped stays: letting go of it asks the device
        if multiprocessing.parent_process() is not None:
            os._exit(1)  # leaving in order would wait for the device
        raise lost  # it is the user's own process, in which the engine runs

    def close(self) -> None:
        self._taker.close()

    def _make_host(self) -> ModelHost:
        host = self._make(self._vllm_config, self._model, self._device, self._draft)
        if self._discards:
            host.note_discarded()
        return host

    def _refusal(self, request: WorkerRequest) -> WeightBusError | None:
        if self._needs_draft and self._draft is None:
            return DraftUnknown(self._vllm_config.model_config.model)
        touches = isinstance(request, Apply) or (
            isinstance(request, Inspect) and request.layout_digest is not None
        )
        if touches and are_weights_asleep():
            return EngineAsleep(type(request).__name__)
        return None


def drafts_from_checkpoint(vllm_config: Any) -> bool:
    """Whether the engine has a drafter that is made of the same checkpoint as its model."""
    speculative = vllm_config.speculative_config
    draft_config = getattr(speculative, "draft_model_config", None)
    if draft_config is None or draft_config is vllm_config.model_config:
        return False
    return bool(draft_config.model == vllm_config.model_config.model)
