"""What the demo asks of engines of a kind: how one is started, and how it is compared with the
trainer. Owns nothing; the processes are the fleet's.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from msgspec import Struct

from weightbus.cli.demo.words import Expected

if TYPE_CHECKING:
    from weightbus.cli.demo.fleet import Fleet

__all__ = ("ASK_S", "EngineKind", "EngineSpec", "consume_command", "embedding_faults")

ASK_S = 60.0
"""One request to an engine."""

EMBEDDING_TOLERANCE = 1e-5

JOIN_WINDOW_S = 1.0
"""How long a leader waits for an engine that is present: small machines are slow."""


class EngineKind(ABC):
    """Engines of one kind and one model."""

    start_s: ClassVar[float]
    """From the start of processes, on a small machine, to an engine's first answer."""
    holds: ClassVar[str]
    """What is known of an engine that has no fault."""

    @abstractmethod
    def describe(self, spec: EngineSpec) -> str:
        """What is started, in a few words."""

    @abstractmethod
    async def start(self, fleet: Fleet, spec: EngineSpec) -> None:
        """Start an engine and its consumer in `fleet`; both die with this process.

        Raises:
            DemoFailed: a process that must answer first has not.
        """

    @abstractmethod
    async def faults(self, fleet: Fleet, spec: EngineSpec, expected: Expected) -> list[str]:
        """Ask an engine what it holds: what is not as the trainer says."""


class EngineSpec(Struct, frozen=True, kw_only=True):
    """One engine of the demo."""

    engine: str
    model: str
    kind: EngineKind
    ranks: int = 1
    host: str = ""
    """Host id of its own, as if it were another machine; empty: this host's."""


def consume_command(spec: EngineSpec, directory: Path) -> list[str]:
    """`weightbus consume` for an engine, but for the options of its kind."""
    return [
        *(sys.executable, "-m", "weightbus", "consume"),
        *("--model", spec.model, "--engine-id", spec.engine),
        *("--engine-dir", str(directory)),
        *("--join-window", str(JOIN_WINDOW_S)),
        *(("--host-id", spec.host) if spec.host else ()),
    ]


def embedding_faults(found: Sequence[float], expected: Sequence[float]) -> list[str]:
    """What is wrong with an engine's embedding of the probe."""
    if len(found) != len(expected):
        return [f"its embedding has {len(found)} values, the trainer's {len(expected)}"]
    off = [abs(x - y) for x, y in zip(found, expected, strict=True)]
    if all(each <= EMBEDDING_TOLERANCE for each in off):
        return []
    worst = math.nan if any(map(math.isnan, off)) else max(off)
    return [f"its embedding is off by {worst:.2e}"]
