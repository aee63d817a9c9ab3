"""A simulated engine: what every rank's parameters hold, and what it claims to serve.

It outlives its consumer. The invariant that matters most is checked here, at every change: an
engine that is not paused holds one whole version in all ranks, and it is the one that it claims.
"""

from __future__ import annotations

from tests.sim.trainer import Source
from tests.sim.world import Broken, World

__all__ = ("EMPTY", "MIX", "SimEngine")

EMPTY = 0
"""Content of a rank that has got nothing yet."""
MIX = -1
"""Content of a rank that is neither the old nor the new version."""


class SimEngine:
    """One inference engine."""

    def __init__(
        self, world: World, name: str, host: str, ranks: int, sources: dict[int, Source]
    ) -> None:
        self.name = name
        self.host = host
        self._world = world
        self._sources = sources
        self.contents = [EMPTY] * ranks
        self.version = -1
        """What it serves, or served last."""
        self.incarnation = 0
        self.paused = False
        self.touched = False
        """A rank was written to since it last served."""
        self.lost = False
        """Its processes were started anew, and have got nothing since."""
        self.streams = False
        """Its plan is proven by a first update: it can do with a stream."""

    @property
    def ranks(self) -> int:
        return len(self.contents)

    def restart(self) -> None:
        """The engine's own processes are new and hold nothing."""
        self.incarnation += 1
        self.contents = [EMPTY] * self.ranks
        self.version = -1
        self.paused = self.touched = self.lost = self.streams = False

    def pause(self) -> None:
        self.paused = True

    def unpause(self) -> None:
        """Go on as before a pause during which nothing was written."""
        self.paused = False
        self.check()

    def begin_write(self, rank: int) -> None:
        if not self.paused:
            raise Broken(f"engine {self.name} is written to while it serves")
        self.contents[rank] = MIX
        self.touched = True

    def end_write(self, rank: int, content: int) -> None:
        self.contents[rank] = content

    def resume(self, version: int) -> None:
        """Serve `version`."""
        if version < self.version:
            raise Broken(f"engine {self.name} goes back from {self.version} to {version}")
        self.version = version
        self.paused = self.touched = self.lost = False
        self.streams = True
        self._world.note(self.name, "serves", version)
        self.check()

    def holds(self, version: int) -> bool:
        """Whether all ranks hold one whole publication of `version`."""
        content = self.contents[0]
        if any(other != content for other in self.contents):
            return False
        if content == EMPTY:
            return version == -1
        return content != MIX and self._sources[content].ready.version == version

    def check(self) -> None:
        if not self.paused and not self.holds(self.version):
            raise Broken(
                f"engine {self.name} claims version {self.version} and serves {self.contents}"
            )
