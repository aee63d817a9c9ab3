"""The contract of an engine: everything Weight bus asks of vLLM, SGLang or a model of your own.

Does no I/O. One `Engine` stands for one inference engine with one worker per rank. The consumer
service is its only caller and never calls two of its methods at once, except `state`,
`first_token`, and before a pause `before_pause` and `look`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from msgspec import Struct

from weightbus.schemas.worker import Applied, Attached, Cell, Described, Feed, Inspected, Prepared

__all__ = ("Engine", "EngineReport", "TokenSeen")


class EngineReport(Struct, frozen=True, kw_only=True):
    """What an engine says of itself."""

    version: int
    """The version it serves or last served; -1: none."""
    paused: bool
    """Requests wait."""
    touched: bool
    """It holds other than what it last served: an update began and did not end whole, or was not
    proven by who began it, were it of the same version. It must not serve before one is."""
    ranks: int
    error: str = ""
    """Why its workers were last lost; empty: they never were."""


class TokenSeen(Struct, frozen=True, kw_only=True):
    """When an engine's first token of a version was there."""

    at_ns: int
    """Since the Unix epoch, by this host's clock."""
    resolution_ns: int = 0
    """It was there at most so long before."""


class Engine(ABC):
    """One inference engine.

    Every method takes `deadline_s`, its whole budget in seconds, and raises:

    Raises:
        DeadlineExceeded: the budget ran out.
        WorkerLost: a worker is gone.
        EngineUnavailable: the engine cannot be reached or refused.
    """

    kind: ClassVar[str]
    """`torch`, `vllm`, ...: shown to monitors."""

    @property
    @abstractmethod
    def ranks(self) -> int:
        """Number of workers."""

    @abstractmethod
    async def describe(
        self, layout_digest: str, layout: bytes, deadline_s: float
    ) -> tuple[Described, ...]:
        """What every rank needs of a layout, in rank order. Serving goes on.

        `layout` is as `encode_layout` made it. Engines cache by digest.

        Raises:
            ApplyFailed: a worker refused the layout; its live parameters are not touched.
        """

    @abstractmethod
    async def attach(
        self,
        layout_digest: str,
        needs_digests: Sequence[str],
        cells: Sequence[Sequence[Cell]],
        deadline_s: float,
    ) -> tuple[Attached, ...]:
        """Compile every rank's plan; `cells[rank]` are what it shall digest. Serving goes on.

        Raises:
            ApplyFailed: a worker refused; its live parameters are not touched.
        """

    async def prepare(
        self, layout_digest: str, feeds: Mapping[int, Feed], deadline_s: float
    ) -> tuple[Prepared, ...]:
        """Begin what takes long of an `apply` of these feeds. Serving goes on, and is not held up.

        Returns at once, in the order of `feeds`; asked again, a rank says whether it is done. What
        is not asked for, or cannot be prepared, `apply` does. By default there is nothing to do.

        Raises:
            ApplyFailed: a worker refused; its live parameters are not touched.
        """
        return tuple(Prepared(request=0, rank=rank, ready=True) for rank in feeds)

    async def before_pause(self, deadline_s: float) -> None:
        """What `pause` does before requests wait, done ahead of it. Serving goes on. By default
        there is nothing to do."""
        del deadline_s

    @abstractmethod
    async def pause(self, deadline_s: float) -> None:
        """Returns when no request is running; requests that come wait. Idempotent."""

    @abstractmethod
    async def apply(
        self,
        version: int,
        layout_digest: str,
        feeds: Mapping[int, Feed],
        deadline_s: float,
    ) -> tuple[Applied, ...]:
        """Write `version` into the live parameters of the ranks named in `feeds`. Paused only.

        Returns, in the order of `feeds`, once every device is synchronised. It raises only when
        no rank writes any more, or when a rank that might is lost.

        Raises:
            ApplyFailed: a worker failed. `touched` says whether a live parameter of any rank may
                have been written: a rank that has applied counts, too.
        """

    @abstractmethod
    async def inspect(self, layout_digest: str | None, deadline_s: float) -> tuple[Inspected, ...]:
        """What every rank's parameters hold now, read back if `layout_digest` is given."""

    async def look(self, deadline_s: float) -> tuple[Inspected, ...]:
        """What every rank's parameters hold now, by the shortest way to know it. By default, as
        `inspect` says."""
        return await self.inspect(None, deadline_s)

    @abstractmethod
    async def resume(self, version: int, deadline_s: float) -> None:
        """Serve `version`: requests that waited run on it. Only after every rank's proof."""

    async def first_token(self, version: int, deadline_s: float) -> TokenSeen | None:
        """Wait for the first token that is made with `version`; to be called right after `resume`,
        and callable beside everything else. It holds up neither the engine nor its next pause.

        None: there was none within `deadline_s` or before the next pause, or the engine cannot
        tell, as by default.

        Raises:
            DeadlineExceeded, EngineUnavailable: the engine does not answer, or refused.
        """
        del version, deadline_s
        return None

    @abstractmethod
    async def state(self, deadline_s: float) -> EngineReport:
        """What the engine serves; callable at any time."""
