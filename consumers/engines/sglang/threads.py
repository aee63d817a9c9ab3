"""Loading a model on one thread: what a model writes on other threads cannot be traced.

Does no I/O. Some of SGLang's models (DeepSeek's) give the copies of their `load_weights` to a pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ("on_one_thread",)

R = TypeVar("R")


@contextmanager
def on_one_thread() -> Iterator[None]:
    """What this thread gives to thread pools, it does itself, at once. What others give to them is
    done as ever."""
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
