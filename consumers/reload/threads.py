"""A few threads that do one worker's moving and digesting, and are joined before anything goes on.

Owns its threads: started by the first call that has work for them, ended by `close`. `ctypes` and
numpy release the interpreter's lock, so threads of one process move and digest side by side.

Invariant: when `run` returns or raises, no call of it runs any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final, TypeVar

__all__ = ("MOST_THREADS", "Threads", "threads_per_worker")

MOST_THREADS: Final = 8
"""Of one worker: about as many as saturate the memory of a socket."""

Result = TypeVar("Result")


def threads_per_worker(cores: int, workers: int) -> int:
    """A worker's share of the cores that all workers of its engine run on, within limits."""
    return max(1, min(MOST_THREADS, cores // workers))


class Threads:
    """Runs calls on `count` threads, the caller's own among them. Not for several callers at once.

    With a count of 1 everything runs on the caller's own.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None

    def run(self, calls: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run every call once, and return what they returned, in their order.

        After an error no further call is begun. Raises an error of the caller's own thread, or
        else of another, once all calls that had been begun have ended.
        """
        helpers = min(self.count, len(calls)) - 1
        if helpers <= 0:
            return [call() for call in calls]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count - 1, "weightbus-move")
        results: dict[int, Result] = {}
        left = deque(enumerate(calls))
        futures = [self._pool.submit(_work, left, results) for _ in range(helpers)]
        try:
            _work(left, results)
        finally:
            wait(futures)
        for future in futures:
            future.result()
        return [results[number] for number in range(len(calls))]

    def close(self) -> None:
        """End the threads. A later call starts new ones."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _work(left: deque[tuple[int, Callable[[], Result]]], results: dict[int, Result]) -> None:
    """Take calls, one by one, from the front, until none is left; leave none if one fails."""
    is_whole = False
    try:
        while left:
            try:
                number, call = left.popleft()
            except IndexError:  # another thread was faster
                break
            results[number] = call()
        is_whole = True
    finally:
        if not is_whole:
            left.clear()
