"""What a plan may ask of machines, and when one route is better than another. Pure."""

from __future__ import annotations

from msgspec import Struct

from weightbus.consumers.planning.staging import StagingLimits

__all__ = ("PlanLimits",)


class PlanLimits(Struct, frozen=True, kw_only=True):
    """What a plan may ask of the machines that run it."""

    staging: StagingLimits = StagingLimits()
    slowest_bytes_per_s: int = 200 * 2**20
    """A host that moves its bytes slower than this has failed; it sets a large model's deadline."""
    predicted_times: float = 4.0
    """A transfer may take so many times what is predicted for it."""
    form_versions: int = 10
    """Forming groups is paid once for so many versions, when routes are compared."""
    tie_share: float = 0.1
    """Predicted times that differ by less than this share, or by less than `tie_s`, are equal."""
    tie_s: float = 0.25
    replica_share: float = 0.8
    """Who can read in place takes a broadcast if that takes at most this share of the time, and"""
    replica_s: float = 0.02
    """is so many seconds sooner: what depends on others can fail by them."""

    def about(self, seconds: float, times: int = 1) -> float:
        """The longest that is about as long as the sum of so many times."""
        return max(seconds * (1 + self.tie_share), seconds + times * self.tie_s)

    def worth(self, seconds: float) -> float:
        """The longest that is worth depending on others, for who takes so long in place."""
        return min(seconds * self.replica_share, seconds - self.replica_s)
