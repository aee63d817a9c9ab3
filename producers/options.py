"""What a trainer may choose of how it publishes. Does no I/O."""

from __future__ import annotations

from typing import get_args

from msgspec import Struct

from weightbus.bus.endpoint import P2pOptions
from weightbus.bus.errors import SettingInvalid
from weightbus.producers.slots import WhenBusy
from weightbus.producers.writers import SlotsIn

__all__ = ("PublisherOptions", "WhenBusy", "check_options")


class PublisherOptions(Struct, frozen=True, kw_only=True):
    """Where a publisher keeps versions, how long it waits, and how hard it works."""

    slots: SlotsIn = "host"
    """Which memory the two slots lie in:

    - `host`: shared memory, wherever the tensors lie. Serves every engine and takes no GPU memory.
      A trainer on a GPU waits while its tensors go over the link: 0.4 s for 15 GB.
    - `device`: the GPU that holds the tensors, twice their size. The trainer waits for a copy
      within the GPU. Serves engines on GPUs of this host, and no others.
    - `both`: a GPU slot for those, and one in shared memory, filled in the background, for all
      others. The trainer waits as with `device`; the version is announced, to all, once the second
      is whole, too: 0.4 s later for 15 GB.
    - `auto`: of tensors on one GPU `device`, or `both` if there is `p2p`; of others, and where GPU
      memory cannot be had or shared, `host`, with a warning unless no tensor lies on a GPU.
    """
    when_busy: WhenBusy = "wait"
    """What to do with a version while engines still read the older one in its slot, or the newest:

    - `wait` for them, at most `slot_wait_s`; then it fails with `SlotBusy`. The trainer stands
      still meanwhile, and after 1 s that is warned about.
    - `skip` the version at once: `VersionSkipped`. The trainer never waits for an engine.
    - `fail` at once with `SlotBusy`.

    A version that does not come is an event, too: `CheckpointSkipped`, with who is busy.
    """
    slot_wait_s: float = 120.0
    """For readers of the older version and of the newest, before the older one's slot is reused."""
    seal_timeout_s: float = 60.0
    """For the parts of all ranks, from when this rank has written its own."""
    close_wait_s: float = 10.0
    """At the end, for readers of the versions that are retired."""
    linger_s: float = 30.0
    """At a good end, before that: for present engines to serve the newest version, but those that
    have refused it.

    What is published in the background has as long, and 10 s, to be announced; it is cancelled
    then, and at once where the end is not a good one."""
    digest_threads: int = 4
    """Threads that digest slots in host memory while the tensors are copied there, or right after
    that where this process may use fewer than two cores for each. Where the tensors lie on one GPU,
    that GPU does it, if it can: it takes 48 bytes of its memory per 128 KiB of the part, 11 MB for
    30 GB, and as long as the copy, which it overlaps."""
    p2p: P2pOptions | None = None
    """How engines on other hosts may read slots in host memory; None: not at all."""


def check_options(options: PublisherOptions) -> None:
    """
    Raises:
        SettingInvalid: there are no such slots, or no such policy, or no slots that `p2p` could let
            others read.
    """
    if options.slots not in get_args(SlotsIn):
        known = ", ".join(get_args(SlotsIn))
        raise SettingInvalid("slots", options.slots, f"must be one of {known}")
    if options.when_busy not in get_args(WhenBusy):
        known = ", ".join(get_args(WhenBusy))
        raise SettingInvalid("when_busy", options.when_busy, f"must be one of {known}")
    if options.slots == "device" and options.p2p is not None:
        raise SettingInvalid("slots", options.slots, "p2p needs slots in host memory: say 'both'")
