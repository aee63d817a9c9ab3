"""A bus in memory with the faults of a real one: it drops, doubles, delays, reorders, restarts.

As on the real bus, subjects of a stream keep their last message, presence and leases live in stores
with a TTL, and what a client publishes while it is cut off is sent when it is back. A client that
missed anything learns so by a reconnect, sooner or later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.sim.world import NS_PER_S, World
from weightbus.consumers.round import events as ev
from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.progress import EngineState, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import (
    Abort,
    Commit,
    Join,
    Proven,
    RoundComplete,
    RoundPlan,
)

__all__ = ("Bus", "BusFaults", "Client", "event_of")

PRESENCE_TTL_S = 3.0
READER_TTL_S = 4.0
ROUND_TTL_S = 2.0
FOREVER_NS = 2**62


def event_of(message: Message) -> ev.Event:
    """What a consumer makes of a message that it hears."""
    match message:
        case CheckpointReady():
            return ev.CheckpointSeen(message, "0" * 32)
        case CheckpointRetired():
            return ev.CheckpointGone(message.version, message.reason, message.producer)
        case Join():
            return ev.JoinSeen(message)
        case RoundPlan():
            return ev.PlanSeen(message)
        case Proven():
            return ev.ProvenSeen(message)
        case Commit():
            return ev.CommitSeen(message)
        case Abort():
            return ev.AbortSeen(message)
        case RoundComplete():
            return ev.RoundCompleteSeen(message)
        case UpdateComplete() | UpdateFailed():
            return ev.UpdateSeen(message)
        case _:
            raise TypeError(type(message).__name__)


@dataclass
class BusFaults:
    """How badly the bus behaves. Probabilities are per message and receiver."""

    drop: float = 0.0
    double: float = 0.0
    slow: float = 0.0
    slow_s: float = 0.3


class Client(ABC):
    """Whoever is connected to the bus."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.cut = False
        self.outbox: list[Message] = []
        """Said while the bus could not be reached."""
        self.said_ns = 0
        """When the last message said reaches the server: they keep their order."""
        self.presence_ns = 0
        """When the last change of presence reaches this client: they keep their order."""
        self.resync_due = False

    @abstractmethod
    def hear(self, event: ev.Event) -> None:
        """A message or a change of presence has come."""

    @abstractmethod
    def reconnected(self) -> None:
        """The connection is back, or something was missed."""


@dataclass
class Lease:
    engine: str
    client: Client
    expires_ns: int


@dataclass
class Present:
    state: EngineState
    client: Client


@dataclass
class Bus:
    """The server and everything that it stores."""

    world: World
    faults: BusFaults
    up: bool = True
    clients: list[Client] = field(default_factory=list)
    ready: CheckpointReady | None = None
    retired: dict[str, int] = field(default_factory=dict)
    """Producer -> the last version that it retired."""
    plans: dict[str, RoundPlan] = field(default_factory=dict)
    presence: dict[str, Present] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    revision: int = 0
    readers: dict[tuple[int, str], Lease] = field(default_factory=dict)
    dropped_s: dict[str, float] = field(default_factory=dict)
    """Engine -> when it was last gone from presence."""

    # Connections.

    def connect(self, client: Client) -> None:
        self.clients.append(client)

    def reaches(self, client: Client) -> bool:
        return self.up and client.alive and not client.cut

    def vanish(self, client: Client) -> None:
        """The client has died or is cut off: what it keeps alive expires."""
        if not client.alive:
            self.clients.remove(client)
        for engine, present in self.presence.items():
            if present.client is client:
                self.world.after(PRESENCE_TTL_S, self._expire, engine, present)
        for lease in self.readers.values():
            if lease.client is client:
                lease.expires_ns = self.world.now_ns + int(READER_TTL_S * NS_PER_S)

    def come_back(self, client: Client) -> None:
        """The client can reach the bus again: it says what it could not, and catches up."""
        said, client.outbox = client.outbox, []
        for message in said:
            self.publish(client, message)
        self.catch_up(client)

    def catch_up(self, client: Client) -> None:
        """What a client reads from the streams and the stores after a reconnect."""
        client.resync_due = False
        if not self.reaches(client):
            return
        for present in list(self.presence.values()):
            self._tell_presence(client, ev.EngineSeen(present.state))
        client.reconnected()

    def stop(self) -> None:
        self.up = False

    def start(self) -> None:
        self.up = True
        for client in list(self.clients):
            if not client.cut:
                self.come_back(client)
        for engine, present in self.presence.items():
            if not present.client.alive or present.client.cut:
                self.world.after(PRESENCE_TTL_S, self._expire, engine, present)

    # Messages.

    def publish(self, client: Client, message: Message) -> None:
        if client.outbox or not self.reaches(client):
            client.outbox.append(message)
            return
        at_ns = self.world.now_ns + int(self.world.between(0.0001, 0.001) * NS_PER_S)
        client.said_ns = max(client.said_ns, at_ns)
        self.world.at(client.said_ns, self._arrive, client, message)

    def _arrive(self, client: Client, message: Message) -> None:
        if client.alive and not self.reaches(client):
            client.outbox.append(message)
            return
        if not self.up:
            return
        if isinstance(message, CheckpointReady):
            self.ready = message
        elif isinstance(message, CheckpointRetired):
            self.retired[message.producer] = message.version
        elif isinstance(message, RoundPlan):
            self.plans[message.round] = message
        world, faults = self.world, self.faults
        event = event_of(message)
        for receiver in self.clients:
            if not self.reaches(receiver):
                continue
            dice = world.random.random()
            delay_s = 0.0001 + 0.001 * dice
            if dice < faults.drop:
                self._miss(receiver)
                continue
            if dice > 1.0 - faults.slow:
                delay_s = world.between(0.001, faults.slow_s)
            elif dice > 1.0 - faults.slow - faults.double:
                world.after(delay_s + world.between(0.0, 0.5), self._deliver, receiver, event)
            world.after(delay_s, self._deliver, receiver, event)

    def _deliver(self, receiver: Client, event: ev.Event) -> None:
        if self.reaches(receiver):
            receiver.hear(event)
        elif receiver.alive:
            self._miss(receiver)

    def _miss(self, receiver: Client) -> None:
        """A message is lost only with a connection: the client will know, in a while."""
        if not receiver.resync_due:
            receiver.resync_due = True
            self.world.after(self.world.between(0.5, 3.0), self._reconnect, receiver)

    def _reconnect(self, receiver: Client) -> None:
        if receiver.resync_due and self.reaches(receiver):
            self.catch_up(receiver)

    # Presence.

    def put_state(self, client: Client, state: EngineState) -> None:
        if not self.reaches(client):
            return
        known = self.presence.get(state.engine)
        self.presence[state.engine] = Present(state, client)
        if known is None or known.state != state:
            for receiver in self.clients:
                self._tell_presence(receiver, ev.EngineSeen(state))

    def drop_state(self, engine: str) -> None:
        if self.presence.pop(engine, None) is not None:
            self.dropped_s[engine] = self.world.now_s
            for receiver in self.clients:
                self._tell_presence(receiver, ev.EngineGone(engine))

    def _expire(self, engine: str, present: Present) -> None:
        if self.up and self.presence.get(engine) is present:
            self.drop_state(engine)

    def _tell_presence(self, receiver: Client, event: ev.Event) -> None:
        if self.reaches(receiver):
            at_ns = self.world.now_ns + int(self.world.between(0.0002, 0.002) * NS_PER_S)
            receiver.presence_ns = max(receiver.presence_ns, at_ns)
            self.world.at(receiver.presence_ns, self._deliver, receiver, event)

    # Requests: they reach the server and come back, or get lost on the way.

    def request(self, client: Client, ask: Callable[[], ev.Event | None]) -> None:
        if self.reaches(client):
            self.world.after(self.world.between(0.0001, 0.001), self._ask, client, ask)

    def _ask(self, client: Client, ask: Callable[[], ev.Event | None]) -> None:
        if self.reaches(client):
            answer = ask()
            if answer is not None:
                delay_s = self.world.between(0.0001, 0.001)
                self.world.after(delay_s, self._answer, client, answer)

    def _answer(self, client: Client, answer: ev.Event) -> None:
        if self.reaches(client):
            client.hear(answer)

    def campaign(self, client: Client, round_id: str, engine: str) -> None:
        def ask() -> ev.Event:
            now_ns = self.world.now_ns
            lease = self.leases.get(round_id)
            if lease is not None and lease.client is not client and lease.expires_ns > now_ns:
                return ev.LeaseHeld(round_id, lease.engine)
            self.revision += 1
            self.leases[round_id] = Lease(engine, client, now_ns + int(ROUND_TTL_S * NS_PER_S))
            return ev.LeaseWon(round_id, self.revision)

        self.request(client, ask)

    def renew(self, client: Client, round_id: str) -> None:
        def ask() -> ev.Event | None:
            now_ns = self.world.now_ns
            lease = self.leases.get(round_id)
            if lease is None or lease.client is not client or lease.expires_ns <= now_ns:
                return ev.LeaseLost(round_id)
            self.revision += 1
            lease.expires_ns = now_ns + int(ROUND_TTL_S * NS_PER_S)
            return None

        self.request(client, ask)

    def release(self, client: Client, round_id: str) -> None:
        def ask() -> None:
            lease = self.leases.get(round_id)
            if lease is not None and lease.client is client:
                del self.leases[round_id]

        self.request(client, ask)

    def take_reader(self, client: Client, version: int, engine: str) -> bool:
        """Hold a version's slot for as long as the client is connected; False: not reached."""
        if not self.reaches(client):
            return False
        self.readers[version, engine] = Lease(engine, client, FOREVER_NS)
        return True

    def drop_reader(self, client: Client, version: int, engine: str) -> None:
        lease = self.readers.get((version, engine))
        if lease is not None and lease.client is client and self.reaches(client):
            del self.readers[version, engine]

    def reads(self, version: int) -> bool:
        """Whether anyone holds a version's slot."""
        now_ns = self.world.now_ns
        return any(
            lease.expires_ns > now_ns
            for (read, _), lease in self.readers.items()
            if read == version
        )
