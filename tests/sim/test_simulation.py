"""Round machines by the thousand, under every fault: 2,000 seeds here, more with `make sim`."""

from __future__ import annotations

import pytest

from tests.sim.consumer import Consumer
from tests.sim.scenario import Simulation
from weightbus.schemas.base import Message
from weightbus.schemas.codec import decode, encode

SEEDS = 2000
SEEDS_PER_TEST = 50
LOG_LINES = 60


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_every_invariant_holds_when_anything_fails(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        simulation = Simulation(seed)
        try:
            simulation.run()
        except Exception as error:
            error.add_note(simulation.world.log(LOG_LINES))
            error.add_note(f"replay: python -m tests.sim --seeds 1 --first {seed} --log")
            raise


def test_a_seed_replays_exactly_when_run_again() -> None:
    runs = [Simulation(7), Simulation(7)]
    for simulation in runs:
        simulation.run()
    assert runs[0].world.log() == runs[1].world.log()


def test_all_routes_and_both_endings_occur_when_seeds_differ() -> None:
    routes: set[str] = set()
    endings: set[str] = set()
    for seed in range(100):
        simulation = Simulation(seed)
        simulation.run()
        routes |= simulation.checks.routes
        for reports in simulation.checks.reports.values():
            endings.update(type(report).__name__ for report in reports)
    assert routes == {"local", "broadcast", "p2p"}
    assert endings == {"UpdateComplete", "UpdateFailed"}


@pytest.mark.parametrize("seed", range(3000, 3008))
def test_every_message_is_valid_when_a_machine_says_it(seed: int) -> None:
    said: set[str] = set()
    simulation = Simulation(seed)
    ambushes = simulation.checks.on_said

    def check(consumer: Consumer, message: Message) -> None:
        assert decode(encode(message), None, type(message)) == message
        said.add(type(message).__name__)
        ambushes(consumer, message)

    simulation.checks.on_said = check
    simulation.run()
    assert said >= {"Join", "RoundPlan", "UpdateComplete", "RoundComplete"}
