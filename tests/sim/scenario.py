"""From a seed to a world: who is there, what goes wrong and when, and what must hold at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.sim.bus import Bus, BusFaults
from tests.sim.checks import Checks
from tests.sim.consumer import Consumer, ConsumerFaults
from tests.sim.engine import SimEngine
from tests.sim.trainer import MODEL, Source, Trainer, TrainerPlan
from tests.sim.transfer import Groups, TransferFaults
from tests.sim.world import Broken, World
from weightbus.consumers.planner import plan_request
from weightbus.consumers.round.config import SERVING_CAUSES, RoundConfig
from weightbus.consumers.round.machine import RoundMachine
from weightbus.schemas.base import Message
from weightbus.schemas.progress import PERMANENT_CAUSES, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import (
    Abort,
    Budgets,
    Commit,
    CommitPolicy,
    Join,
    Proven,
    RoundComplete,
    RoundPlan,
)

__all__ = ("MakeMachine", "Simulation", "make_machine")

FAULTS_END_S = 30.0
LAST_PUBLISH_S = 33.0
END_S = 130.0
MAX_ATTEMPTS = 4
BUDGETS = Budgets(prepare_s=5.0, transfer_s=6.0, commit_s=2.0, round_s=20.0)

SAID = (Join, RoundPlan, Proven, Commit, Abort, UpdateComplete, UpdateFailed, RoundComplete)

MakeMachine = Callable[[RoundConfig], RoundMachine]


def make_machine(config: RoundConfig) -> RoundMachine:
    """The machine as it is in the service, with the service's planner."""
    return RoundMachine(config, plan_request)


@dataclass
class Ambush:
    """A fault that waits for the protocol to come to a point."""

    message: type[Message]
    count: int
    """Strikes when so many messages of this type have been said."""
    whom: Callable[[Consumer], Consumer]
    """From the one who said it, who is struck."""
    delay_s: float
    strike: Callable[[Consumer], None]


class Simulation:
    """One world, made from one seed."""

    def __init__(
        self,
        seed: int,
        make: MakeMachine = make_machine,
        driver: type[Consumer] = Consumer,
    ) -> None:
        self.seed = seed
        self.world = world = World(seed)
        self._make = make
        self._driver = driver
        dice = world.random
        calm = world.chance(0.1)
        level = 0.0 if calm else dice.choice((0.3, 1.0, 1.0, 3.0))
        self._bus_faults = BusFaults(
            drop=level * dice.choice((0.0, 0.005, 0.02)),
            double=level * dice.choice((0.0, 0.02)),
            slow=level * dice.choice((0.0, 0.03)),
            slow_s=dice.choice((0.3, 3.0)),
        )
        self._consumer_faults = ConsumerFaults(
            prepare=level * dice.choice((0.0, 0.05)),
            slow_prepare=level * dice.choice((0.0, 0.05, 0.2)),
            resume=level * dice.choice((0.0, 0.05)),
            prepare_s=dice.choice((0.05, 0.05, 0.5)),
        )
        self._transfer_faults = TransferFaults(
            untouched=level * dice.choice((0.0, 0.05)),
            touched=level * dice.choice((0.0, 0.08)),
            corrupt=level * dice.choice((0.0, 0.03)),
            hang=level * dice.choice((0.0, 0.02)),
            unproven=level * dice.choice((0.0, 0.1)),
        )
        self.bus = Bus(world, self._bus_faults)
        self.sources: dict[int, Source] = {}
        self.checks = Checks(world, self.bus)
        self._groups = Groups()
        self._policy: CommitPolicy = "together" if world.chance(0.4) else "each"
        self._join_window_s = dice.choice((0.05, 0.2, 0.2, 3.0))
        self._processes = 0
        hosts = ["host-a", "host-b", "host-c"][: dice.randint(1, 3)]
        ranks = dice.randint(1, 3)
        self._trainer_plan = TrainerPlan(
            host=hosts[0],
            period_s=dice.choice(((0.1, 0.3), (0.3, 1.5), (2.0, 5.0), (4.0, 9.0))),
            copy_s=dice.choice((0.02, 0.5)),
            slot_wait_s=dice.choice((0.5, 5.0, 20.0)),
            in_slots=world.chance(0.75),
        )
        self.engines = [
            SimEngine(world, f"e{number}", dice.choice(hosts), ranks, self.sources)
            for number in range(dice.randint(2, 6))
        ]
        if not calm and world.chance(0.2):
            self._groups.apart = frozenset(e.name for e in dice.sample(self.engines, 2))
        self.trainer = self._start_trainer(0)
        for engine in self.engines:
            self._start_consumer(engine, world.between(0.0, 1.0))
        if not calm:
            self._schedule_faults(dice.randint(0, 6))
            self._ambushes = [self._plan_ambush() for _ in range(dice.randint(0, 5))]
            self.checks.on_said = self._spring_ambushes
        world.after(FAULTS_END_S, self._end_faults)
        if world.chance(0.8):
            world.after(LAST_PUBLISH_S, lambda: self.trainer.publish_last())

    def run(self) -> None:
        """Run it to its end.

        Raises:
            Broken: an invariant does not hold; any other exception is a defect, too.
        """
        self.world.run(END_S)
        self._check_end()

    # Processes.

    def _start_consumer(self, engine: SimEngine, delay_s: float) -> None:
        self._processes += 1
        config = RoundConfig(
            model=MODEL,
            engine=engine.name,
            consumer=f"{engine.name}-c{self._processes}",
            host_id=engine.host,
            commit=self._policy,
            budgets=BUDGETS,
            join_window_s=self._join_window_s,
            round_ttl_s=2.0,
            max_attempts=MAX_ATTEMPTS,
            regroup_s=3.0,
            backoff_s=0.5,
            backoff_max_s=4.0,
        )
        consumer = self._driver(
            self.world,
            self.bus,
            self._groups,
            engine,
            self.sources,
            config,
            self._make,
            self._consumer_faults,
            self._transfer_faults,
            self.checks,
        )
        consumer.started_s = self.world.now_s + delay_s
        self.checks.consumers[engine.name] = consumer
        self.bus.connect(consumer)
        self.world.after(delay_s, consumer.start)

    def _start_trainer(self, next_version: int) -> Trainer:
        self._processes += 1
        trainer = Trainer(self.world, self.bus, self._trainer_plan, self._processes, self.sources)
        self.bus.connect(trainer)
        trainer.start(next_version, FAULTS_END_S)
        return trainer

    # Faults.

    def _schedule_faults(self, count: int) -> None:
        kinds: tuple[Callable[[], None], ...] = (
            self._kill_consumer,
            self._kill_consumer,
            self._kill_leader,
            self._kill_engine,
            self._lose_some_engine,
            self._doubt_some_engine,
            self._stop_consumer,
            self._stall_consumer,
            self._cut_consumer,
            self._cut_consumer,
            self._kill_trainer,
            self._cut_trainer,
            self._restart_bus,
        )
        for _ in range(count):
            at_s = self.world.between(1.0, FAULTS_END_S - 1.0)
            self.world.after(at_s, self.world.random.choice(kinds))

    def _plan_ambush(self) -> Ambush:
        """A fault at a point of the protocol, where a moment chosen by time would rarely fall."""
        dice = self.world.random
        strikes = (self._kill, self._cut, self._stall, self._stop, self._lose_engine)
        return Ambush(
            message=dice.choice(SAID),
            count=1 + int(dice.expovariate(0.15)),
            whom=dice.choice((self._itself, self._itself, self._a_leader, self._anyone)),
            delay_s=dice.choice((0.0, 0.001, 0.03, 0.5)),
            strike=dice.choice(strikes),
        )

    def _spring_ambushes(self, consumer: Consumer, message: Message) -> None:
        for ambush in self._ambushes:
            if isinstance(message, ambush.message):
                ambush.count -= 1
                if ambush.count == 0 and self.world.now_s < FAULTS_END_S:
                    self.world.after(ambush.delay_s, ambush.strike, ambush.whom(consumer))

    def _itself(self, consumer: Consumer) -> Consumer:
        return consumer

    def _anyone(self, _: Consumer) -> Consumer:
        return self._some_consumer()

    def _a_leader(self, consumer: Consumer) -> Consumer:
        """Who holds the lease that was won last, if any is held."""
        leases = sorted(self.bus.leases.values(), key=lambda lease: lease.expires_ns)
        return self.checks.consumers[leases[-1].engine] if leases else consumer

    def _some_consumer(self) -> Consumer:
        engine = self.world.random.choice(self.engines)
        return self.checks.consumers[engine.name]

    def _kill_consumer(self) -> None:
        self._kill(self._some_consumer())

    def _kill_leader(self) -> None:
        self._kill(self._a_leader(self._some_consumer()))

    def _kill(self, consumer: Consumer) -> None:
        if consumer.alive:
            self.world.note(consumer.name, "is killed")
            consumer.die()
            self._start_consumer(consumer.engine, self.world.between(0.2, 6.0))

    def _kill_engine(self) -> None:
        """A whole host's processes die: the engine's and its consumer's."""
        consumer = self._some_consumer()
        if consumer.alive:
            self._kill(consumer)
            consumer.engine.restart()
            self.world.note(consumer.engine.name, "is empty")

    def _lose_some_engine(self) -> None:
        self._lose_engine(self._some_consumer())

    def _lose_engine(self, consumer: Consumer) -> None:
        if consumer.alive:
            consumer.lose_engine()

    def _doubt_some_engine(self) -> None:
        consumer = self._some_consumer()
        if consumer.alive and not consumer.stalled:
            consumer.doubt_engine()

    def _stop_consumer(self) -> None:
        self._stop(self._some_consumer())

    def _stop(self, consumer: Consumer) -> None:
        if consumer.alive and not consumer.stalled:
            self.world.note(consumer.name, "is stopped")
            consumer.stop()
            self.world.after(8.0, self._kill_or_start, consumer)

    def _kill_or_start(self, consumer: Consumer) -> None:
        """A service that was stopped is started again; one that does not stop is killed first."""
        if self.checks.consumers[consumer.engine.name] is consumer:
            if consumer.alive:
                self._kill(consumer)
            else:
                self._start_consumer(consumer.engine, 0.1)

    def _stall_consumer(self) -> None:
        self._stall(self._some_consumer())

    def _stall(self, consumer: Consumer) -> None:
        if consumer.alive and not consumer.stalled:
            self.world.note(consumer.name, "stalls")
            consumer.stall()
            self.world.after(self.world.between(0.1, 8.0), self._wake, consumer)

    def _wake(self, consumer: Consumer) -> None:
        if consumer.alive and consumer.stalled:
            self.world.note(consumer.name, "goes on")
            consumer.go_on()

    def _cut_consumer(self) -> None:
        self._cut(self._some_consumer())

    def _cut(self, consumer: Consumer) -> None:
        if consumer.alive and not consumer.cut:
            self.world.note(consumer.name, "is cut off")
            consumer.cut = True
            self.bus.vanish(consumer)
            self.world.after(self.world.between(0.2, 9.0), self._heal, consumer)

    def _cut_trainer(self) -> None:
        trainer = self.trainer
        if trainer.alive and not trainer.cut:
            trainer.cut = True
            self.world.after(self.world.between(0.2, 9.0), self._heal, trainer)

    def _heal(self, client: Consumer | Trainer) -> None:
        if client.alive and client.cut:
            self.world.note(client.name, "is back")
            client.cut = False
            if self.bus.up:
                self.bus.come_back(client)

    def _kill_trainer(self) -> None:
        if self.trainer.alive:
            self.world.note(self.trainer.name, "is killed")
            self.trainer.die()
            self.world.after(self.world.between(0.5, 5.0), self._replace_trainer)

    def _replace_trainer(self) -> None:
        """The next trainer sweeps what the last one left, and may publish a version again."""
        self.trainer.unlink()
        again = 1 if self.trainer.next_version > 0 and self.world.chance(0.3) else 0
        self.trainer = self._start_trainer(self.trainer.next_version - again)

    def _restart_bus(self) -> None:
        if self.bus.up:
            self.world.note("bus", "is down")
            self.bus.stop()
            self.world.after(self.world.between(0.2, 4.0), self._start_bus)

    def _start_bus(self) -> None:
        if not self.bus.up:
            self.world.note("bus", "is up")
            self.bus.start()

    def _end_faults(self) -> None:
        self.world.note("all", "faults end")
        self._bus_faults.drop = self._bus_faults.double = self._bus_faults.slow = 0.0
        faults = self._consumer_faults
        faults.prepare = faults.slow_prepare = faults.resume = 0.0
        moves = self._transfer_faults
        moves.untouched = moves.touched = moves.corrupt = moves.hang = moves.unproven = 0.0
        self._start_bus()
        for client in list(self.bus.clients):
            if isinstance(client, Consumer):
                self._wake(client)
            if isinstance(client, Consumer | Trainer):
                self._heal(client)

    # The end.

    def _check_end(self) -> None:
        """Every engine serves the newest version that can be had, or has said why not."""
        self.checks.at_end()
        if self.bus.ready is None:
            return
        newest = self.sources[self.bus.ready.created_ns]
        version = newest.ready.version
        for engine in self.engines:
            consumer = self.checks.consumers[engine.name]
            if not consumer.alive:
                raise Broken(f"{engine.name} has no consumer at the end")
            if engine.version >= version and not engine.paused:
                continue
            failures = [
                report.cause
                for report in self.checks.reports.get((engine.name, version), ())
                if isinstance(report, UpdateFailed)
            ]
            serves = f"{engine.name} serves {engine.version}, not {version}"
            if not failures:
                raise Broken(f"{serves}, and has not said why")
            down = engine.paused or engine.version < 0
            if self._can_be_had(newest, engine) and (down or not self._given_up(failures)):
                raise Broken(f"{serves}, although it can be had: {failures}")

    def _can_be_had(self, source: Source, engine: SimEngine) -> bool:
        return source.whole and (source.trainer.alive or source.host == engine.host)

    def _given_up(self, failures: list[str]) -> bool:
        """Whether an engine that serves another version has reason not to try this one again."""
        final = failures[-1] in PERMANENT_CAUSES | SERVING_CAUSES
        return final or len(failures) >= MAX_ATTEMPTS
