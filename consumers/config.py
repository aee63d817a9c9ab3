"""The settings of one consumer. Does no I/O; filled in once, by the entry point."""

from __future__ import annotations

from msgspec import Struct

from weightbus.schemas.base import RouteName, Token
from weightbus.schemas.rounds import Budgets, CommitPolicy, Links

__all__ = ("ConsumerConfig",)


class ConsumerConfig(Struct, frozen=True, kw_only=True):
    """What a consumer may do, and how long it waits."""

    model: Token
    """The model its engine serves."""
    engine: Token
    """The engine's id: unique among the engines of the model."""
    host_id: str
    """As `weightbus.bus.host.host_id` gives it: who shares memory has the same one."""
    file_roots: tuple[str, ...] = ()
    """Directories below which files may be read; none: no files at all."""
    routes: tuple[RouteName, ...] = ("local", "broadcast", "p2p")
    """Routes that may be taken."""
    address: str = "127.0.0.1"
    """Where other hosts reach this one: for groups, and for the transfer engine. A loopback address
    does for consumers that are all on one machine. What listens there neither asks who speaks to it
    nor encrypts: it belongs to a network that only the fleet is in."""
    p2p_protocol: str = "tcp"
    """Of the transfer engine."""
    p2p_device: str = ""
    """Network card of the transfer engine, by its name; empty: it chooses."""
    keep_copy: bool = False
    """Whether a whole copy of the version is held in shared memory, so that others can read it from
    here."""
    staging_bytes: int = 0
    """Most memory that staging may take, over all ranks; 0: a share of what is free."""
    stall_s: float = 10.0
    """A bucket that makes no progress for so long has failed."""
    links: Links = Links()
    """What was measured on this host."""
    commit: CommitPolicy = "each"
    """Policy of the rounds that this consumer leads."""
    join_window_s: float = 0.2
    """How long a leader waits for the engines that are present."""
    budgets: Budgets = Budgets()
    """Deadlines of the rounds that this consumer leads, and of its own preparation."""
    heartbeat_s: float = 1.0
    """How often the engine's state is put."""
    round_ttl_s: int = 3
    """After how long a silent leader loses its round."""
    reader_ttl_s: int = 10
    """After how long a silent reader no longer protects a slot."""
    engine_lost_s: float = 60.0
    """How long an engine may be silent before its consumer gives up."""
    command_s: float = 10.0
    """Budget of a command to the engine that is answered at once, whatever it is doing."""
    stop_s: float = 10.0
    """Budget of the whole clean-up."""
