"""Which versions can be had, and which one to go for next. Pure bookkeeping, does no I/O.

- A version is worth going for if it is above the floor: the last version that was, or may have
  been, served. An engine that was touched, and so serves nothing, may also go to the floor itself.
- The newest goes first, and what fails is tried again after a pause that grows. A version that
  cannot be used at all (`permanent_causes`) is left alone. While the engine serves, so is one that
  failed `max_attempts` times, or for a cause of `serving_causes`. An engine that is down gives up
  nothing else: it goes round the versions that can be had, newest first. What failed because there
  was no engine (`absence_causes`) counts for no version.
- What is retired cannot be had, until it is published again: then it is new in every respect. The
  two are told apart by `created_ns` of the trainer's clock; only that it grows is relied on.
"""

from __future__ import annotations

from dataclasses import dataclass

from weightbus.consumers.round.config import RoundConfig
from weightbus.consumers.round.effects import NS_PER_S
from weightbus.schemas.checkpoint import CheckpointReady

__all__ = ("Candidate", "Versions")

MAX_KNOWN = 8
"""Versions kept: the newest ones. A publisher keeps two alive; files may keep more."""
MAX_RETIRED = 64
"""Retired versions remembered, and refused ones."""


@dataclass
class Candidate:
    """A version that can be had, and how it went so far."""

    ready: CheckpointReady
    received_ns: int
    trace_id: str
    failures: int = 0
    absences: int = 0
    """Of these failures, those for want of an engine."""
    cause: str = ""
    """Why it failed last: the name of the error class."""
    not_before_ns: int = 0
    """When it may be tried (again)."""

    @property
    def version(self) -> int:
        return self.ready.version

    @property
    def attempts(self) -> int:
        """That went wrong with an engine there."""
        return self.failures - self.absences

    def comes_from(self, producer: str) -> bool:
        """Whether it is a version of this producer; empty: of any."""
        return producer in ("", self.ready.producer)


class Versions:
    """The versions that this consumer has heard of and that are not known to be gone."""

    def __init__(self, config: RoundConfig) -> None:
        self._config = config
        self._known: dict[int, Candidate] = {}
        self._retired: dict[int, int] = {}
        """Version -> `created_ns` of what was retired."""
        self._refused: dict[int, int] = {}
        """Version -> `created_ns` of what was too old."""

    def see(self, ready: CheckpointReady, trace_id: str, now_ns: int) -> bool:
        """Remember `ready`; False if that says nothing new."""
        version, created_ns = ready.version, ready.created_ns
        known = self._known.get(version)
        if known is not None and created_ns <= known.ready.created_ns:
            return False
        if created_ns <= self._retired.get(version, -1):
            return False
        self._known[version] = Candidate(ready, now_ns, trace_id)
        while len(self._known) > MAX_KNOWN:
            del self._known[min(self._known)]
        return True

    def goes_back(self, ready: CheckpointReady, floor: int) -> bool:
        """Whether `ready` was published after the version that is served, and yet is older: true
        once for each publication. What is only heard of late does not go back."""
        version, created_ns = ready.version, ready.created_ns
        served = self._known.get(floor)
        known_ns = max(
            -1 if served is None else served.ready.created_ns,
            self._retired.get(version, -1),
            self._refused.get(version, -1),
        )
        if version >= floor or created_ns <= known_ns:
            return False
        self._refused[version] = created_ns
        while len(self._refused) > MAX_RETIRED:
            del self._refused[min(self._refused)]
        return True

    def replaces(self, candidate: Candidate) -> bool:
        """Whether the version has been published again since: `candidate` is gone."""
        return self._known.get(candidate.version, candidate) is not candidate

    def retire(self, version: int, producer: str = "") -> None:
        """A version is gone, if it is this producer's; empty: whoever's it is."""
        known = self._known.get(version)
        if known is not None and known.comes_from(producer):
            del self._known[version]
            self._retired[version] = known.ready.created_ns
        while len(self._retired) > MAX_RETIRED:
            del self._retired[min(self._retired)]

    def fail(self, candidate: Candidate, cause: str, now_ns: int, *, prepared: bool = True) -> None:
        """An attempt failed, before the engine was prepared for it or later."""
        config = self._config
        candidate.failures += 1
        candidate.absences += not prepared and cause in config.absence_causes
        candidate.cause = cause
        pause_s = min(config.backoff_s * 2 ** (candidate.failures - 1), config.backoff_max_s)
        candidate.not_before_ns = now_ns + round(pause_s * NS_PER_S)

    def serve(self, version: int) -> None:
        """`version` is served: what is older cannot be gone for any more."""
        self._known = {v: known for v, known in self._known.items() if v >= version}
        if version in self._known:
            served = self._known[version]
            served.failures, served.absences = 0, 0
            served.cause, served.not_before_ns = "", 0

    def best(self, floor: int, *, touched: bool) -> Candidate | None:
        """The version to go for, now or at its `not_before_ns`.

        Args:
            floor: the last version that was, or may have been, served; -1: none.
            touched: the engine serves nothing, because its parameters may be a mix.
        """
        down = touched or floor < 0
        in_turn = self._config.attempts_in_turn
        worth = [
            known
            for version, known in self._known.items()
            if (version > floor or (touched and version == floor)) and self._hopeful(known, down)
        ]
        return min(
            worth,
            key=lambda known: (known.attempts // in_turn if down else 0, -known.version),
            default=None,
        )

    def _hopeful(self, candidate: Candidate, down: bool) -> bool:
        """Whether another attempt may go better."""
        config = self._config
        if candidate.cause in config.permanent_causes:
            return False
        given_up = (
            candidate.cause in config.serving_causes or candidate.attempts >= config.max_attempts
        )
        return down or not given_up
