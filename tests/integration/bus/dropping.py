"""A link whose answers get lost: what a connection that breaks between request and answer does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import cast

from weightbus.bus.jetstream import JetStream
from weightbus.bus.link import Incoming, Interrupted, Link, open_link
from weightbus.bus.settings import BusSettings
from weightbus.bus.streams import bus_streams

__all__ = ("DroppingLink", "open_dropping")


class DroppingLink:
    """Passes everything on. Of the requests whose subject contains `drop_on`, the answer to the
    `drop_nth` (from 1) is lost after the server has acted on it."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.drop_on, self.drop_nth = "", 0
        self.sent: list[str] = []
        """Subjects of all requests."""

    @property
    def url(self) -> str:
        return self._link.url

    @property
    def connections(self) -> int:
        return self._link.connections

    def drop(self, subject_part: str, nth: int = 1) -> None:
        self.drop_on, self.drop_nth = subject_part, nth

    async def request(
        self,
        subject: str,
        payload: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        operation: str,
    ) -> Incoming:
        self.sent.append(subject)
        answer = await self._link.request(subject, payload, headers, operation=operation)
        if self.drop_on in subject and self.drop_nth:
            self.drop_nth -= 1
            if not self.drop_nth:
                raise Interrupted(operation)
        return answer

    def __getattr__(self, name: str) -> object:
        return getattr(self._link, name)


@asynccontextmanager
async def open_dropping(
    settings: BusSettings, *, resend_for_s: float = 60.0
) -> AsyncIterator[tuple[DroppingLink, JetStream]]:
    """A link that loses answers, and the streams over it."""
    async with open_link(settings, str(settings.url)) as link:
        dropping = DroppingLink(link)
        jetstream = JetStream(
            cast("Link", dropping),
            bus_streams(settings.prefix),
            ready_within_s=settings.request_timeout_s,
            reconnect_for_s=settings.reconnect_for_s,
            resend_for_s=resend_for_s,
        )
        await jetstream.open()
        yield dropping, jetstream
