"""The settings of one round machine, and the planner that it is given. Does no I/O."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.source import SourceMemory
from weightbus.schemas.base import Token
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.placement import HostId
from weightbus.schemas.progress import PERMANENT_CAUSES
from weightbus.schemas.rounds import Budgets, CommitPolicy, Join, Links, RoundPlan

__all__ = ("SERVING_CAUSES", "Origin", "PlanRequest", "Planner", "RoundConfig")

SERVING_CAUSES = frozenset({"PlanError"})
"""Errors that may pass with time, but are not worth a second attempt while the engine serves."""


class RoundConfig(Struct, frozen=True, kw_only=True):
    """Who this consumer is, and how long it waits. Durations are seconds."""

    model: Token
    engine: Token
    consumer: Token
    """Instance id of this consumer process."""
    host_id: HostId
    commit: CommitPolicy = "each"
    """Policy of the rounds that this consumer leads."""
    links: Links = Links()
    """What was measured on its host: goes into its joins."""
    budgets: Budgets = Budgets()
    """Deadlines of the rounds that this consumer leads, and of its own preparation."""
    join_window_s: float = 0.2
    """How long a leader waits for engines that are present and have not joined."""
    repeat_s: float = 0.1
    """After how long `Join` and `Proven` are said again; doubled each time, to `repeat_max_s`."""
    repeat_max_s: float = 1.0
    round_ttl_s: float = 3.0
    """After how long a silent leader's lease expires; it is renewed three times as often."""
    regroup_s: float = 5.0
    """How long a leader waits for the members of a broken group to join again."""
    max_attempts: int = 4
    """How often one version is tried while the engine serves another."""
    attempts_in_turn: int = 2
    """How often one version is tried before it is the next one's turn, while the engine is down."""
    group_attempts: int = 2
    """How many plans of a group are run for one version; then the engine goes on alone."""
    backoff_s: float = 1.0
    """Pause before the second attempt; doubled before each later one."""
    backoff_max_s: float = 30.0
    permanent_causes: frozenset[str] = PERMANENT_CAUSES
    """Errors for which a version is never tried again."""
    serving_causes: frozenset[str] = SERVING_CAUSES
    """Errors for which a version is not tried again while the engine serves another."""
    absence_causes: frozenset[str] = frozenset({"EngineUnavailable"})
    """Errors by which there is no engine that a version could be prepared in."""
    peer_causes: frozenset[str] = frozenset({"PeerLost"})
    """Errors by which a transfer says that another member of its group failed: the next plan is
    waited for."""

    def __post_init__(self) -> None:
        """Refuse times that contradict each other.

        Raises:
            PlanError: one of them makes another pointless.
        """
        budgets = self.budgets
        for name, value, least, why in (
            ("join_window_s", self.join_window_s, 0.0, "it must not be negative"),
            ("repeat_s", self.repeat_s, 0.001, "a pause takes time"),
            ("repeat_max_s", self.repeat_max_s, self.repeat_s, "it is at least repeat_s"),
            ("round_ttl_s", self.round_ttl_s, 0.001, "a lease lasts"),
            ("regroup_s", self.regroup_s, 0.001, "members need time to join again"),
            ("backoff_s", self.backoff_s, 0.001, "a pause takes time"),
            ("backoff_max_s", self.backoff_max_s, self.backoff_s, "it is at least backoff_s"),
            ("max_attempts", self.max_attempts, 1, "there is a first one"),
            ("attempts_in_turn", self.attempts_in_turn, 1, "there is a first one"),
            ("group_attempts", self.group_attempts, 1, "there is a first one"),
            ("budgets.round_s", budgets.round_s, budgets.transfer_s, "a round holds a transfer"),
        ):
            if not value >= least:
                raise PlanError(name, value, f"must be at least {least:g}: {why}")

    @property
    def negotiate_s(self) -> float:
        """From `Join` to a plan; then the engine goes on alone. Outlives one leader that dies
        at the end of its join window: the window, its lease, the pause of who campaigns next, the
        window of that one; a lease's time is left for what is said."""
        return 2 * self.join_window_s + 3 * self.round_ttl_s

    @property
    def replan_s(self) -> float:
        """From a broken group to the next plan; then the engine goes on alone. Outlives one dead
        leader, and the regrouping under the next."""
        return self.regroup_s + 3 * self.round_ttl_s


class Origin(Struct, frozen=True, kw_only=True):
    """Where a version comes from, as one consumer sees it."""

    layout_bytes: int = 0
    """Of all its tensors; 0: not known."""
    hosts: int = 1
    """That hold it and can be read from: publishers', and those of copies."""
    files: bool = False
    """It lies in files, not in memory."""
    memory: SourceMemory = "other"
    """In which its host reads it."""


class PlanRequest(Struct, frozen=True, kw_only=True):
    """Everything that a plan is made of.

    A plan takes the fields of the same name from it, `model`, `version` and `checkpoint_ns` (its
    `created_ns`) from `ready`, `created_ns` from `now_ns`, and names the engines of `joins`: all
    but those that can be reached by no route.
    """

    joins: tuple[Join, ...]
    """The engines to plan for, in the order of their ids."""
    origin: Origin = Origin()
    """As the consumer that plans sees it."""
    ready: CheckpointReady
    round: str
    epoch: int
    leader: str
    late: bool
    """True: one engine alone, whose peers must not be disturbed: `local` or `p2p`."""
    commit: CommitPolicy
    budgets: Budgets
    now_ns: int


Planner = Callable[[PlanRequest], RoundPlan]
"""Pure. Raises `PlanError` if no engine can be reached by any route."""
