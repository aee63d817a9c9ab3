"""What clients, the front process and the ranks of a `torch` engine say to each other. Does no I/O.

Every request has a number, and its answer the same number. Clients speak to the
front, and the front to the ranks, in the same words: an `Infer` goes through unchanged.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from weightbus.schemas.base import Count, Nanoseconds, Reason, Seconds
from weightbus.schemas.worker import Request, WorkerMessage

__all__ = (
    "CLIENT_REPLIES",
    "CLIENT_REQUESTS",
    "RANK_REPLIES",
    "RANK_REQUESTS",
    "AskFingerprints",
    "AskFirstAnswer",
    "AskState",
    "ClientReply",
    "ClientRequest",
    "Done",
    "Fingerprints",
    "FirstAnswered",
    "Infer",
    "Inferred",
    "Inputs",
    "Outputs",
    "Pause",
    "Ping",
    "RankReply",
    "RankRequest",
    "Refused",
    "Restart",
    "Resume",
    "StateReport",
)

HeldVersion = Annotated[int, Meta(ge=-1)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]


class Inputs(Struct, frozen=True, kw_only=True):
    """What a model is asked: sentences or token ids."""

    sentences: Annotated[tuple[str, ...], Meta(max_length=1024)] = ()
    prompts: Annotated[tuple[tuple[TokenId, ...], ...], Meta(max_length=1024)] = ()
    new_tokens: Annotated[int, Meta(ge=0, le=4096)] = 0
    """How many tokens a decoder shall add to each prompt."""


class Outputs(Struct, frozen=True, kw_only=True):
    """What a model answers, in the order of the inputs."""

    tokens: tuple[tuple[int, ...], ...] = ()
    vectors: tuple[tuple[float, ...], ...] = ()
    """One unit vector per sentence or prompt."""


class Infer(WorkerMessage, frozen=True, kw_only=True):
    """Compute this on one version of the weights."""

    request: Request
    inputs: Inputs
    deadline_s: Seconds
    """How long the request may wait for its turn, and for the engine to serve."""


class Inferred(WorkerMessage, frozen=True, kw_only=True):
    request: Request
    version: HeldVersion
    """The version it was computed with; -1: the file the engine was started with."""
    outputs: Outputs


class AskFingerprints(WorkerMessage, frozen=True, kw_only=True):
    """What does every rank hold, bit for bit? Takes its turn like an `Infer`."""

    request: Request
    deadline_s: Seconds


class Fingerprints(WorkerMessage, frozen=True, kw_only=True):
    request: Request
    version: HeldVersion
    fingerprints: tuple[str, ...]
    """What `fingerprint` makes of each rank, in rank order. A rank sends its own alone."""


class Pause(WorkerMessage, frozen=True, kw_only=True):
    """Answered once no request is running; requests that come wait."""

    request: Request
    deadline_s: Seconds


class Resume(WorkerMessage, frozen=True, kw_only=True):
    """Serve this version, which every rank must hold whole; -1: the file it was started with."""

    request: Request
    version: HeldVersion
    deadline_s: Seconds


class Restart(WorkerMessage, frozen=True, kw_only=True):
    """Kill the ranks and start them anew: one of them is beyond control."""

    request: Request
    reason: Reason
    deadline_s: Seconds


class Done(WorkerMessage, frozen=True, kw_only=True):
    """`Pause`, `Resume`, `Restart` or `Ping` was carried out."""

    request: Request


class Ping(WorkerMessage, frozen=True, kw_only=True):
    """From the front to a rank: are you there?"""

    request: Request


class AskState(WorkerMessage, frozen=True, kw_only=True):
    """Answered at once, whatever the ranks are doing."""

    request: Request
    deadline_s: Seconds


class AskFirstAnswer(WorkerMessage, frozen=True, kw_only=True):
    """When was the first answer made with this version, which is served now? Answered once it is,
    when the engine is paused, or after `deadline_s`."""

    request: Request
    version: HeldVersion
    deadline_s: Seconds


class FirstAnswered(WorkerMessage, frozen=True, kw_only=True):
    request: Request
    at_ns: Nanoseconds = 0
    """By the clock of the engine's host; 0: there was none."""


class StateReport(WorkerMessage, frozen=True, kw_only=True):
    request: Request
    version: HeldVersion
    """The version served now or last; -1: none since the ranks were started."""
    paused: bool
    touched: bool
    """Some rank may hold something else than `version`, whole."""
    ready: bool
    """Every rank has been started and answers."""
    ranks: Count
    pids: tuple[int, ...] = ()
    """Process ids of the ranks, in rank order."""
    front_pid: int = 0
    generation: Count = 0
    """How often the ranks were started."""
    waiting: Count = 0
    """Requests that wait for their turn or for the engine to serve."""
    error: Reason = ""
    """Why the ranks were last lost; empty: they never were."""


class Refused(WorkerMessage, frozen=True, kw_only=True):
    """The request was not carried out."""

    request: Request
    error: Annotated[str, Meta(max_length=128)]
    """Name of the error class."""
    reason: Reason
    """Its message; of `DeadlineExceeded` only what took too long."""


ClientRequest = Infer | AskFingerprints | Pause | Resume | Restart | AskState | AskFirstAnswer
ClientReply = Inferred | Fingerprints | Done | StateReport | FirstAnswered | Refused
RankRequest = Infer | AskFingerprints | Ping
RankReply = Inferred | Fingerprints | Done | Refused
CLIENT_REQUESTS: tuple[type[ClientRequest], ...] = (
    Infer,
    AskFingerprints,
    Pause,
    Resume,
    Restart,
    AskState,
    AskFirstAnswer,
)
CLIENT_REPLIES: tuple[type[ClientReply], ...] = (
    Inferred,
    Fingerprints,
    Done,
    StateReport,
    FirstAnswered,
    Refused,
)
RANK_REQUESTS: tuple[type[RankRequest], ...] = (Infer, AskFingerprints, Ping)
RANK_REPLIES: tuple[type[RankReply], ...] = (Inferred, Fingerprints, Done, Refused)
