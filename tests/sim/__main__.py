"""Run simulations: `python -m tests.sim --seeds 100000 [--first 0]`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tests.sim.scenario import MakeMachine, Simulation, make_machine

PROGRESS_EVERY = 1000
LOG_LINES = 400


def main(arguments: Sequence[str] | None = None, make: MakeMachine = make_machine) -> int:
    """Run the seeds that were asked for; stop at the first that fails, and show it.

    Returns:
        0: all held; 1: one failed.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--first", type=int, default=0, help="the first one (default: 0)")
    parser.add_argument("--log", action="store_true", help="show the whole event log of every seed")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    for number, seed in enumerate(range(options.first, options.first + options.seeds), 1):
        simulation = Simulation(seed, make)
        try:
            simulation.run()
        except Exception as error:
            print(simulation.world.log(None if options.log else LOG_LINES))
            print(f"seed {seed} failed: {type(error).__name__}: {error}")
            print(f"replay: python -m tests.sim --seeds 1 --first {seed} --log")
            if options.log:
                raise
            return 1
        if options.log:
            print(simulation.world.log())
        if number % PROGRESS_EVERY == 0:
            print(f"{number} seeds in {time.monotonic() - began:.0f} s", flush=True)
    print(f"{options.seeds} seeds held, in {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
