"""Whether a checkpoint makes the whole of a model, told while it is loaded on `meta`.

Does no I/O. SGLang's models pass over a tensor that they do not know, and do not notice one that is
missing: loaded, such a checkpoint would leave a part of the old version in the engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from weightbus.consumers.reload.memory import storage_id

__all__ = ("OPTIONAL", "LoadCoverage", "on_one_thread")

R = TypeVar("R")

OPTIONAL = frozenset({"input_scale", "k_scale", "prob_scale", "q_scale", "v_scale"})
"""Last names of parameters that SGLang fills by itself where a checkpoint has none."""


class LoadCoverage(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is written to a model's parameters while it is active, on its thread."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = dict(model.named_parameters())
        self._written_bytes = {storage_id(p): 0 for p in self._parameters.values()}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor):
            storage = storage_id(args[0])
            if storage in self._written_bytes:
                self._written_bytes[storage] += args[0].nbytes
        return func(*args, **(kwargs or {}))

    def lacking(self) -> list[str]:
        """Parameters that were written in part or not at all, by name, but for `OPTIONAL` ones."""
        return sorted(
            name
            for name, parameter in self._parameters.items()
            if name.rpartition(".")[2] not in OPTIONAL
            and self._written_bytes[storage_id(parameter)] < parameter.nbytes
        )


@contextmanager
def on_one_thread() -> Iterator[None]:
    """What this thread gives to thread pools, it does itself, at once: what a model writes on other
    threads can neither be traced nor counted. Other threads' pools are as ever."""
    submit_elsewhere = ThreadPoolExecutor.submit
    here = threading.get_ident()

    def submit(
        pool: ThreadPoolExecutor, task: Callable[..., R], /, *args: Any, **kwargs: Any
    ) -> Future[R]:
        if threading.get_ident() != here:
            return submit_elsewhere(pool, task, *args, **kwargs)
        future: Future[R] = Future()
        try:
            future.set_result(task(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - raised again where the result is asked for
            future.set_exception(error)
        return future

    pools: Any = ThreadPoolExecutor
    pools.submit = submit
    try:
        yield
    finally:
        pools.submit = submit_elsewhere
