"""The rates of a host as a file says them: what a person has misspelled is refused. Pure."""

from __future__ import annotations

from msgspec import structs

from weightbus.schemas.rounds import Links

__all__ = ("HostLinks",)


class HostLinks(Links, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`Links`, but every field is known."""

    @property
    def links(self) -> Links:
        """As messages hold them."""
        return Links(**structs.asdict(self))
