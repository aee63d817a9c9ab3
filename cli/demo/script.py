"""What the demo does, step by step. Owns nothing: story and fleet are the command's.

Other hosts are virtual: host ids of their own, so that nothing is mapped, and every byte takes the
way that it would take between machines.
"""

from __future__ import annotations

from collections.abc import Sequence

from weightbus.cli.demo.fleet import EngineSpec, Fleet
from weightbus.cli.demo.story import Say, Story
from weightbus.cli.demo.words import DECODER_CONFIG, Expected

__all__ = ("tell", "tell_local")

A = EngineSpec(engine="a", model="minilm", architecture="minilm")
B = EngineSpec(engine="b", model="minilm", architecture="minilm", host="host-b")
C = EngineSpec(engine="c", model="minilm", architecture="minilm", host="host-c")
D = EngineSpec(engine="d", model="minilm", architecture="minilm", host="host-d")
B_LOCAL = EngineSpec(engine="b", model="minilm", architecture="minilm")
MOE = EngineSpec(
    engine="moe", model="decoder", architecture="decoder", config=DECODER_CONFIG, ranks=2
)


async def tell(story: Story, fleet: Fleet, say: Say) -> None:
    """Four versions by three routes; one engine comes late, one is killed and comes back."""
    await fleet.start_trainer()
    await story.start((A, B, C, MOE))
    say("a shares the trainer's host and reads its memory; b and c are elsewhere, and pull by p2p:")
    say("an engine's first version goes through its own loader, which proves the plan made of it")
    await _step(story, 1, (A, B, C), decoder=True)
    say("from now on their plans are proven: one broadcast streams each version to b and c")
    second = await _step(story, 2, (A, B, C), decoder=True)

    say("engine d joins, late, on a host of its own: it pulls by p2p, and disturbs nobody")
    await story.start((D,))
    await story.check(D, second)

    say("engine b is killed (SIGKILL), and a version is published without it")
    await fleet.kill(B.engine)
    missed = await _step(story, 3, (A, C, D), decoder=False)
    say("engine b starts again, late, and catches up by p2p")
    await story.start((B,))
    await story.check(B, missed)

    await _step(story, 4, (A, B, C, D), decoder=True)


async def tell_local(story: Story, fleet: Fleet, say: Say) -> None:
    """The same on one host, where the libraries of the other routes are missing."""
    await fleet.start_trainer()
    await story.start((A, B_LOCAL, MOE))
    await _step(story, 1, (A, B_LOCAL), decoder=True)
    await _step(story, 2, (A, B_LOCAL), decoder=True)

    say("engine b is killed (SIGKILL), and a version is published without it")
    await fleet.kill(B_LOCAL.engine)
    missed = await _step(story, 3, (A,), decoder=False)
    say("engine b starts again, late, and catches up")
    await story.start((B_LOCAL,))
    await story.check(B_LOCAL, missed)

    await _step(story, 4, (A, B_LOCAL), decoder=True)


async def _step(
    story: Story, version: int, followers: Sequence[EngineSpec], *, decoder: bool
) -> Expected:
    """One version of the encoder, and of the decoder if asked for, in every engine."""
    expected = await story.publish("minilm", version)
    for spec in followers:
        await story.check(spec, expected)
    if decoder:
        await story.check(MOE, await story.publish("decoder", version))
    return expected
