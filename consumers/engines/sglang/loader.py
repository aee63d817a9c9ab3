"""The weight loader that SGLang calls: `--custom-weight-loader` names `take_turn`.

Owns our end in one worker, made in the first call. SGLang calls the loader in the scheduler of
every tensor-parallel rank, on its main thread, which also runs the forward passes: none runs beside
it. It imports this module when it first needs it, so everything else is imported later yet.

An exception that leaves the loader ends the whole server. So none does, but for one: a process
whose device is lost can never serve again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from weightbus.consumers.engines.sglang.worker import SglangWorker

__all__ = ("take_turn",)

_logger = logging.getLogger(__name__)

_worker: SglangWorker | None = None


def take_turn(model: nn.Module, named_tensors: Sequence[tuple[str, Any]]) -> None:
    """One turn: see `SglangWorker.take`. What goes wrong is logged, and told by no reply.

    Args:
        model: the one that serves.
        named_tensors: a turn as the name of an empty tensor; see `payload`.

    Raises:
        DeviceLost: the device does nothing for this process any more.
    """
    global _worker
    try:
        from weightbus.consumers.engines.sglang.worker import SglangWorker

        if _worker is None or _worker.model is not model:
            if _worker is not None:
                _worker.close()
            _worker = SglangWorker(model)
        for name, _ in named_tensors:
            _worker.take(name)
        lost = _worker.lost
    except Exception:
        _logger.exception("weightbus: this turn came to nothing")
        return
    if lost is not None:
        _worker.leave()
        raise lost
