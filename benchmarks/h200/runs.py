"""What is measured, and what its rows are called. Does no I/O."""

from __future__ import annotations

from typing import Final, Literal, get_args

__all__ = ("KINDS", "Kind", "kind_of", "run_name")

Kind = Literal[
    "link_h2d", "link_peer", "host_tp", "gpu_tp", "host_dp2", "staged_2hosts", "ce_broadcast"
]
"""As the command takes them."""

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
"""In this order: engines and slots of the trainers are kept from run to run where they can be."""


def run_name(kind: Kind, devices: int) -> str:
    """How a run of so many GPUs is called: `host_tp` on 4 is `host_tp4`."""
    match kind:
        case "host_tp" | "gpu_tp":
            return f"{kind}{devices}"
        case "host_dp2":
            return f"host_tp{max(1, devices // 2)}dp2"
        case _:
            return kind


def kind_of(name: str) -> Kind:
    """The inverse of `run_name`.

    Raises:
        ValueError: no run is called so.
    """
    stem = name.rstrip("0123456789")
    found = "host_dp2" if name.endswith("dp2") else stem if stem in KINDS else name
    for kind in KINDS:
        if kind == found:
            return kind
    raise ValueError(f"{name!r} is the name of no run")
