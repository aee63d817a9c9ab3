"""Makes the routes of one consumer from its configuration, and what they share.

Owns, for as long as it is open: the staging blocks, the transfer engine's endpoint, the process
groups and the store that they meet at, and the copies. What a dead consumer of the same model left
in shared memory is removed first.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import anyio.to_thread

from weightbus.bus.blocks import warn_unless_ordered
from weightbus.bus.connection import Bus
from weightbus.bus.endpoint import Endpoint, open_endpoint
from weightbus.bus.errors import EndpointFailed, EndpointUnavailable
from weightbus.bus.sweep import sweep_staging
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.errors import RouteUnavailable
from weightbus.consumers.transfer.broadcast import BroadcastRoute
from weightbus.consumers.transfer.copies import Copies, open_copies
from weightbus.consumers.transfer.fetch import LocalSegments
from weightbus.consumers.transfer.groups import FORM_S, Groups, open_meeting
from weightbus.consumers.transfer.kept import open_kept_copy
from weightbus.consumers.transfer.local import LocalRoute
from weightbus.consumers.transfer.p2p import P2pRoute
from weightbus.consumers.transfer.route import Route
from weightbus.consumers.transfer.sources import Sources
from weightbus.consumers.transfer.staged import Staging
from weightbus.consumers.transfer.staging import BlockPool
from weightbus.consumers.transfer.together import enter_in_thread
from weightbus.schemas.base import RouteName

__all__ = ("open_routes",)

_logger = logging.getLogger(__name__)

LOAD_S: Final = 60.0
"""So long a library may take to load; torch from a cold disk needs many seconds."""

CLOSE_S: Final = 2.0
"""So long groups may take to end; those that take longer end with the process."""

T = TypeVar("T")


@asynccontextmanager
async def open_routes(
    config: ConsumerConfig, bus: Bus, required: Collection[RouteName] = ()
) -> AsyncIterator[list[Route]]:
    """The routes that a configuration allows and this host can take.

    Where something is missing, the routes that need it are left out, with one warning. Broadcast
    needs the transfer engine only for segments that its host can read in no other way.

    Args:
        required: routes that were asked for by name: they are not left out.

    Raises:
        EndpointUnavailable, EndpointFailed, RouteUnavailable: a required route is not to be had.
        BusUnavailable: the bus does not tell of copies.
    """
    async with AsyncExitStack() as stack:
        warn_unless_ordered()
        await anyio.to_thread.run_sync(sweep_staging, config.model)
        pool = BlockPool(f"{config.model}.{config.engine}", config.staging_bytes)
        stack.callback(pool.close)
        local = LocalSegments(config.host_id, config.file_roots)
        stack.callback(local.close)
        parts = _Parts(config, bus, required, stack, Staging(pool, config.stall_s), local)
        yield await parts.routes()


@dataclass(frozen=True)
class _Parts:
    """What the routes are made of."""

    config: ConsumerConfig
    bus: Bus
    required: Collection[RouteName]
    stack: AsyncExitStack
    staging: Staging
    local: LocalSegments

    async def routes(self) -> list[Route]:
        config, routes = self.config, list[Route]()
        if "local" in config.routes:
            routes.append(LocalRoute(config.host_id, config.file_roots, self.staging))
        if {"broadcast", "p2p"} & set(config.routes):
            endpoint, missing = await self._endpoint()
            copies = None
            if endpoint is not None:
                opening = open_copies(self.bus, config.model, config.engine)
                copies = await self.stack.enter_async_context(opening)
            for name in config.routes:
                if name == "broadcast":
                    routes.extend(await self._broadcast(endpoint, missing, copies))
                elif name == "p2p" and endpoint is not None:
                    routes.append(await self._p2p(endpoint, copies))
        if {route.name for route in routes} == {"broadcast"}:
            _logger.warning(
                "only route broadcast is left: this engine cannot get its first version, which "
                "needs local or p2p"
            )
        return routes

    async def _endpoint(self) -> tuple[Endpoint | None, str]:
        """The transfer engine's, or why there is none."""
        config = self.config
        opening = open_endpoint(config.address, config.p2p_protocol, config.p2p_device)
        try:
            endpoint = await self._enter(opening)
            self.staging.pool.register_with(endpoint)
            return endpoint, ""
        except (EndpointUnavailable, EndpointFailed) as error:
            if "p2p" in self.required:
                raise
            _logger.warning(
                "nothing can be read from other hosts, route p2p is left out: %s", error
            )
            return None, str(error)

    async def _broadcast(
        self, endpoint: Endpoint | None, missing: str, copies: Copies | None
    ) -> list[Route]:
        config = self.config
        try:
            meeting = await self._enter(open_meeting(config.address))
        except RouteUnavailable as error:
            if "broadcast" in self.required:
                raise
            _logger.warning("left out: %s", error)
            return []
        form_s = FORM_S + config.stall_s  # a member may wait for memory of a group that broke
        groups = Groups(config.address, form_s=form_s, operation_s=form_s)
        self.stack.callback(groups.close, CLOSE_S)
        sources = Sources(
            self.local,
            config.host_id,
            config.file_roots,
            endpoint=endpoint,
            receiver=config.engine,
            copies=copies,
            missing=missing,
        )
        return [BroadcastRoute(config.engine, sources, self.staging, groups, meeting)]

    async def _p2p(self, endpoint: Endpoint, copies: Copies | None) -> Route:
        config, kept = self.config, None
        if config.keep_copy:
            opening = open_kept_copy(
                self.bus, config.model, config.engine, config.host_id, endpoint
            )
            kept = await self.stack.enter_async_context(opening)
        return P2pRoute(
            endpoint,
            self.staging,
            self.local,
            config.host_id,
            config.file_roots,
            receiver=config.engine,
            copies=copies,
            kept=kept,
        )

    async def _enter(self, context: AbstractContextManager[T]) -> T:
        """Libraries are loaded in a thread: the bus is not to wait for them.

        Raises:
            DeadlineExceeded: one takes too long.
        """
        return await enter_in_thread(self.stack, context, LOAD_S)
