"""Weight bus as an extension of vLLM's workers, for versions without free backend names:
`--worker-extension-cls weightbus.consumers.engines.vllm.extension.WeightBusExtension`.

vLLM makes the class a base of its worker's: `self` is the worker. Its methods are called by
`collective_rpc`, on the worker's main thread, with strings only, so that no unsafe serialization is
needed. Names begin with `weightbus`, since none may be one that the worker has. None of them
raises: see `status.py`. A subclass will do, too, by whatever name.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from weightbus.consumers.engines.turns import Turn
from weightbus.consumers.engines.vllm.worker import (
    VllmWorker,
    drafts_from_checkpoint,
    make_vllm_host,
)

__all__ = ("WeightBusExtension",)

_logger = logging.getLogger(__name__)


class WeightBusExtension:
    weightbus_make_host = staticmethod(make_vllm_host)

    def weightbus_open(self, directory: str) -> None:
        """Make our end in this worker, if there is none, and connect it; our status says how it
        went."""
        worker: Any = self
        ours: VllmWorker | None = getattr(self, "_weightbus", None)
        if ours is None:
            config = worker.vllm_config
            model = worker.model_runner.get_model()
            ours = VllmWorker(config, model, worker.device, self.weightbus_make_host)
            if drafts_from_checkpoint(config):
                find_draft = getattr(worker.model_runner, "get_draft_model", None)
                draft = None if find_draft is None else find_draft()
                if draft is not None:
                    ours.show_draft(draft, config.speculative_config.draft_model_config)
            self._weightbus = ours
        ours.open(directory)

    def weightbus_turn(self, turn: str) -> None:
        """One turn, as JSON."""
        ours: VllmWorker | None = getattr(self, "_weightbus", None)
        try:
            decoded = msgspec.json.decode(turn, type=Turn)
        except msgspec.DecodeError as error:
            _logger.error("not a turn: %s", error)
            return
        if ours is None:
            _logger.error("turn refused: no consumer has opened this worker")
        else:
            ours.take(decoded)
