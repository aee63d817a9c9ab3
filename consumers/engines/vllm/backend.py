"""Weight bus as a weight-transfer backend of vLLM: `--weight-transfer-config '{"backend":
"weightbus"}'`.

Owns our end in one worker. vLLM makes one in every worker once its model is loaded, and calls it on
the worker's main thread. No bytes come by vLLM's calls: `init_transfer_engine` names the directory
where the consumer is, and every `update_weights` is one turn (`turns.py`).

vLLM takes `update_weights` within a session only. Nothing here raises: what a request does is told
by its reply, and what else there is to say by our status (`status.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from torch import nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from weightbus.consumers.engines.turns import Turn
from weightbus.consumers.engines.vllm.worker import VllmWorker

__all__ = ("WeightBusBackend", "WeightBusInitInfo", "WeightBusUpdateInfo")

_logger = logging.getLogger(__name__)


@dataclass
class WeightBusInitInfo(WeightTransferInitInfo):
    directory: str
    """Where the consumer's socket is."""


@dataclass
class WeightBusUpdateInfo(WeightTransferUpdateInfo):
    """A `Turn`."""

    numbers: list[int] = field(default_factory=list)
    wait_s: float = 0.0


class WeightBusBackend(WeightTransferEngine):
    init_info_cls = WeightBusInitInfo
    update_info_cls = WeightBusUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._worker = VllmWorker(self.vllm_config, self.model, self.device)

    def set_weight_update_target(self, model: nn.Module, model_config: Any) -> None:
        """vLLM shows the drafter so, within a session for drafts."""
        super().set_weight_update_target(model, model_config)
        self._worker.show_draft(model, model_config)

    def init_transfer_engine(self, init_info: WeightBusInitInfo) -> None:
        self._worker.open(init_info.directory)

    def start_weight_update(self) -> None:
        """Every turn is whole: nothing else is to be done."""
        self._worker.note_session(True)

    def finish_weight_update(self) -> None:
        """Every turn is whole: nothing else is to be done."""
        self._worker.note_session(False)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One turn; the device is idle when it ends."""
        try:
            turn = msgspec.convert(update_info, Turn)
        except msgspec.ValidationError as error:
            _logger.error("not a turn: %s", error)
        else:
            self._worker.take(turn)

    def receive_weights(self, update_info: WeightBusUpdateInfo) -> None:
        self.update_weights({"numbers": update_info.numbers, "wait_s": update_info.wait_s})

    def shutdown(self) -> None:
        self._worker.close()

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Abstract in some versions of vLLM.

        Raises:
            NotImplementedError: trainers publish by `weightbus.producers`.
        """
        raise NotImplementedError("trainers publish by weightbus.producers, not by vLLM's classes")
