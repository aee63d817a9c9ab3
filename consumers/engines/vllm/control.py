"""What a consumer does to a vLLM engine beside asking its workers: pause, turn, resume, ...

Owns what is known of the engine's interface, and the session that vLLM's weight transfer wants. How
its calls get there is a subclass's: by HTTP (`http.py`), or within the process (`handle.py`).

Two ways lead into vLLM's workers; its configuration tells with which of them it was started:

    backend    init_weight_transfer_engine, then update_weights within a session: one is kept open
    extension  collective_rpc of methods that our extension class gave to its worker

No call of a worker's must fail (`status.py`). So a session is started, used and finished as the
workers' status says that it is: one that a dead consumer left open is taken over.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import anyio
import msgspec

from weightbus.consumers.engines.budget import left_s
from weightbus.consumers.engines.turns import Turn
from weightbus.consumers.engines.vllm.extending import EXTENSION, why_not_ours
from weightbus.consumers.engines.vllm.plugin import BACKEND
from weightbus.consumers.engines.vllm.status import (
    WorkerStatus,
    forget_statuses,
    read_status,
)
from weightbus.consumers.errors import DeadlineExceeded, EngineUnavailable

__all__ = ("NOT_RESET", "PauseMode", "StartedWith", "VllmControl", "Way")

PauseMode = Literal["keep", "wait", "abort"]
"""What becomes of requests that run when the engine is paused."""

Way = Literal["backend", "extension"]

BACKEND_OPTION: Final = """--weight-transfer-config '{"backend": "weightbus"}'"""
EXTENSION_OPTION: Final = f"--worker-extension-cls {EXTENSION}"

NOT_RESET: Final = "its prefix cache, or that of its KV connector, could not be reset"

TOKENS_COUNTER: Final = "vllm:generation_tokens_total"
"""Of Prometheus; it rises with every step that makes tokens."""

START_DRAFT: Final = "start_draft_weight_update"
_TAKE_BACK_POLL_S: Final = 0.02
_SESSION: Final = ("init_weight_transfer_engine", "start_weight_update", "update_weights")

_logger = logging.getLogger(__name__)


class StartedWith(NamedTuple):
    """Options of vLLM."""

    backend: str | None
    """Of weight transfer; None: there is none."""
    extension: str | None
    """Class that extends its workers; None: there is none."""
    encodes: bool
    """It may keep what encoders make, of images or speech."""
    drains: bool
    """Once it is paused, what its workers are told comes behind every step that was begun, and no
    connector holds blocks: not so between pipeline stages, and not where Ray runs the steps."""

    @staticmethod
    def of(vllm_config: Any) -> StartedWith:
        """Of a `VllmConfig`, or of the document that it makes."""
        transfer = _get(vllm_config, "weight_transfer_config")
        extension = _get(_get(vllm_config, "parallel_config"), "worker_extension_cls")
        encoders = _get(_get(vllm_config, "model_config"), "multimodal_config", "not known")
        parallel = _get(vllm_config, "parallel_config")
        drains = (
            _get(parallel, "pipeline_parallel_size") == 1
            and _get(parallel, "distributed_executor_backend") in ("mp", "uni")
            and _get(vllm_config, "kv_transfer_config", "not known") is None
        )
        return StartedWith(
            _get(transfer, "backend"), extension or None, encoders is not None, drains
        )


def _get(thing: Any, name: str, default: Any = None) -> Any:
    return thing.get(name, default) if isinstance(thing, dict) else getattr(thing, name, default)


class VllmControl(ABC):
    """One vLLM engine. Every method takes `deadline_s`, its whole budget in seconds, and raises:

    Raises:
        EngineUnavailable: it cannot be reached, or refused, and why.
        DeadlineExceeded: it did not answer in time; it may still do what it was told.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.way: Way | None = None
        """None: not opened yet."""
        self._directory: Path | None = None
        """Where the workers were told to connect, and leave their status."""
        self._ranks = 0
        self._encodes, self._drains = True, False

    # ---------------------------------------------------------------- what a subclass gives

    @abstractmethod
    async def probe(self, deadline_s: float) -> None:
        """Find out what this vLLM has. To be called before everything else, and when it was
        started anew.

        Raises:
            EngineUnavailable: it lacks what we cannot do without; says what to start it with.
        """

    @abstractmethod
    def has(self, operation: str) -> bool:
        """Whether it has an operation, as named by its HTTP routes. Valid once probed."""

    @abstractmethod
    async def world_size(self, deadline_s: float) -> int:
        """How many workers it has.

        Raises:
            EngineUnavailable: it is data parallel.
        """

    @abstractmethod
    async def started_with(self, deadline_s: float) -> StartedWith:
        """By which options our end in its workers could be made."""

    @abstractmethod
    async def pause(
        self, mode: PauseMode, clear_caches: bool, deadline_s: float, *, stands: bool = False
    ) -> None:
        """Returns when no request runs. One that fails, or is given up, may pause the engine all
        the same: see `take_back_pause`.

        Args:
            stands: it may have been paused before, in whatever mode: its saying so tells nothing.
        """

    @abstractmethod
    async def resume(self, deadline_s: float) -> None: ...

    @abstractmethod
    async def is_paused(self, deadline_s: float) -> bool:
        """vLLM answers between two steps, or once a turn has ended."""

    @abstractmethod
    async def is_sleeping(self, deadline_s: float) -> bool:
        """Whether it sleeps *or* is paused: vLLM does not tell these apart. False if it cannot."""

    @abstractmethod
    async def wake_up(self, tags: Sequence[str], deadline_s: float) -> None:
        """Bring back what these tags name: `weights`, `kv_cache`; empty: everything. When nothing
        is left asleep, vLLM resumes."""

    @abstractmethod
    async def reset_caches(self, deadline_s: float) -> None:
        """Let nothing that was computed with other weights be found again: running requests are
        preempted and computed anew, from their tokens. What a connector keeps elsewhere goes, too,
        where this vLLM can be told so. Paused only.

        Raises:
            EngineUnavailable: something could not be dropped.
        """

    @abstractmethod
    async def set_version(self, version: str, deadline_s: float) -> None:
        """What the engine says it serves, if it can say such a thing."""

    @abstractmethod
    async def tokens_made(self, deadline_s: float) -> float | None:
        """How many tokens it has made since it was started; None: it does not count them."""

    @abstractmethod
    async def _call_workers(
        self, operation: str, arguments: Mapping[str, Any], deadline_s: float
    ) -> None:
        """An operation of vLLM's weight transfer, on every worker."""

    @abstractmethod
    async def _call_method(
        self, method: str, arguments: Sequence[str], deadline_s: float
    ) -> Sequence[Any]:
        """A method of every worker; what each returned."""

    # ---------------------------------------------------------------- what is common

    def _has_encoders(self) -> bool:
        """Whether there is something to drop of what encoders have made: to be dropped after the
        blocks, as only then no request holds it (the encoder caches of vLLM 0.26 and 0.32)."""
        return self._encodes and self.has("reset_encoder_cache")

    async def open(self, directory: Path, deadline_s: float) -> None:
        """Have every worker connect to the consumer of this directory. Idempotent, and to be called
        again when workers are new.

        Raises:
            EngineUnavailable: neither way leads in, or the workers refused: says why.
        """
        end = anyio.current_time() + deadline_s
        self._ranks = await self.world_size(deadline_s)
        started = await self.started_with(left_s(end))
        self._encodes, self._drains, reason = started.encodes, started.drains, ""
        if started.backend == BACKEND and all(map(self.has, _SESSION)):
            self.way = "backend"
        elif started.extension and self.has("collective_rpc"):
            reason = await why_not_ours(started.extension, left_s(end))
            self.way = None if reason else "extension"
        else:
            self.way = None
        if self.way is None:
            raise EngineUnavailable(
                self.name,
                "its workers cannot be reached: start it, with weightbus installed beside it, by "
                f"{BACKEND_OPTION}, or where this vLLM has no such backends by {EXTENSION_OPTION} "
                f"(it has backend {started.backend} and extension {started.extension}{reason})",
            )
        self._directory = directory
        forget_statuses(directory, self._ranks)
        if self.way == "backend":
            info = {"init_info": {"directory": str(directory)}}
            await self._call_workers(_SESSION[0], info, left_s(end))
        else:
            await self._call_method("weightbus_open", [str(directory)], left_s(end))
        for rank, status in enumerate(self._known_statuses()):
            if status.error:
                raise EngineUnavailable(self.name, f"rank {rank}: {status.error}")

    async def take_back_pause(self, deadline_s: float, *, may_come: bool) -> None:
        """Let an engine go on that was not paused before a `pause` that failed, or was given up.

        Args:
            may_come: the pause is on its way: it is waited for, as vLLM would carry it out after
                what overtakes it. One that has not come within the budget will not.
        """
        end = anyio.current_time() + deadline_s
        came: bool | None = None
        """Not known yet."""
        while left_s(end) > _TAKE_BACK_POLL_S:
            try:
                if await self.is_paused(left_s(end)):
                    came = True
                    if self.is_partly_asleep():
                        return
                    await self.resume(left_s(end))
                elif came or not may_come:
                    return
                else:
                    came = False
            except DeadlineExceeded:
                break
            except EngineUnavailable as error:  # one answer that failed is not the last
                _logger.warning("a pause is taken back: %s", error)
            await anyio.sleep(_TAKE_BACK_POLL_S)
        if came is False:
            return
        raise DeadlineExceeded(f"taking back a pause of {self.name}", deadline_s)

    def may_still_pause(self, error: BaseException) -> bool:
        """Whether a `pause` that failed so may be carried out all the same, and later."""
        return not isinstance(error, EngineUnavailable)

    async def turn(self, turn: Turn, deadline_s: float) -> None:
        """Have every worker take this turn; returns when all have.

        Raises:
            EngineUnavailable: also if a worker cannot say how it is; nothing was done then.
        """
        end = anyio.current_time() + deadline_s
        if self._directory is not None and None in self._statuses():
            await self.open(self._directory, deadline_s)
        if self.way == "extension":
            encoded = msgspec.json.encode(turn).decode()
            await self._call_method("weightbus_turn", [encoded], left_s(end))
            return
        if not self._is_session_open():
            await self._call_workers("start_weight_update", {}, left_s(end))
            self._known_statuses()
        info = {"update_info": msgspec.to_builtins(turn)}
        await self._call_workers("update_weights", info, left_s(end))

    async def show_draft(self, deadline_s: float) -> None:
        """Have vLLM show our backend the drafter: it does when a session for drafts begins.

        Raises:
            EngineUnavailable: it has no drafter to show.
        """
        if self.way != "backend" or not self.has(START_DRAFT):
            raise EngineUnavailable(self.name, "this vLLM does not give its drafter away")
        end = anyio.current_time() + deadline_s
        if self._is_session_open():
            await self._call_workers("finish_weight_update", {}, deadline_s)
        await self._call_workers(START_DRAFT, {}, left_s(end))
        await self._call_workers("finish_weight_update", {}, left_s(end))

    async def leave(self, deadline_s: float) -> None:
        """End the session, if there is one; the engine goes on. Only while the workers that were
        opened are there."""
        if self.way == "backend" and self._is_session_open():
            await self._call_workers("finish_weight_update", {}, deadline_s)

    def is_partly_asleep(self) -> bool:
        """Whether a worker lacked memory that vLLM's sleep mode takes when it last had a turn: vLLM
        resumes such an engine when it is told to, and its next step faults. It resumes by itself
        when the last part of it is woken.

        Raises:
            EngineUnavailable: a worker cannot say how it is.
        """
        return any(status.asleep for status in self._known_statuses())

    def discards(self, known: Sequence[int] = ()) -> tuple[int, ...]:
        """How often each worker's weights were discarded (vLLM's sleep at level 2). Reads files,
        and asks nobody: of one that cannot say how it is, what was known."""
        return tuple(
            (known[rank] if rank < len(known) else 0) if status is None else status.discards
            for rank, status in enumerate(self._statuses())
        )

    def is_silent(self) -> bool:
        """Whether a worker cannot say how it is. Reads files, and asks nobody."""
        return None in self._statuses()

    def _is_session_open(self) -> bool:
        """
        Raises:
            EngineUnavailable: in some workers, but not in all: nothing ends that without failing.
                Or a worker cannot say.
        """
        is_open = {status.session for status in self._known_statuses()}
        if len(is_open) > 1:
            reason = "a session is open in some of its workers only: it must be started anew"
            raise EngineUnavailable(self.name, reason)
        return True in is_open

    def _known_statuses(self) -> list[WorkerStatus]:
        """
        Raises:
            EngineUnavailable: a worker could not say how it is when that last changed.
        """
        known = []
        for rank, status in enumerate(self._statuses()):
            if status is None:
                raise EngineUnavailable(
                    self.name,
                    f"its rank {rank} cannot write to {self._directory}: it must be on this host, "
                    "with room on the disk",
                )
            known.append(status)
        return known

    def _statuses(self) -> list[WorkerStatus | None]:
        assert self._directory is not None
        return [read_status(self._directory, rank) for rank in range(self._ranks)]
