"""What the demos do, step by step. Owns nothing: story and fleet are the command's.

Other hosts are virtual: host ids of their own, so that nothing is mapped, and every byte takes the
way that it would take between machines.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from msgspec import Struct

from weightbus.cli.demo.fleet import Fleet
from weightbus.cli.demo.kinds import EngineSpec
from weightbus.cli.demo.story import Say, Story
from weightbus.cli.demo.torch_kind import TorchKind
from weightbus.cli.demo.words import DECODER_CONFIG, Expected

__all__ = ("Script", "choose_script", "choose_vllm_script")


MINILM = TorchKind("minilm")
A = EngineSpec(engine="a", model="minilm", kind=MINILM)
B = EngineSpec(engine="b", model="minilm", kind=MINILM, host="host-b")
C = EngineSpec(engine="c", model="minilm", kind=MINILM, host="host-c")
D = EngineSpec(engine="d", model="minilm", kind=MINILM, host="host-d")
B_LOCAL = EngineSpec(engine="b", model="minilm", kind=MINILM)
MOE = EngineSpec(engine="moe", model="decoder", kind=TorchKind("decoder", DECODER_CONFIG), ranks=2)

STARTING = "starting the trainer and the first engines takes half a minute"


class Script(Struct, frozen=True):
    """One demo."""

    tell: Callable[[Story, Fleet, Say], Awaitable[None]]
    routes: tuple[str, ...]
    """All that it takes, in order of their names, where there is a transfer engine."""


def choose_script(say: Say, *, elsewhere: bool) -> Script:
    """Of torch engines; `elsewhere`: some can be on other hosts."""
    del say
    return Script(_tell if elsewhere else _tell_local, ("broadcast", "local", "p2p"))


def choose_vllm_script(say: Say, *, elsewhere: bool) -> Script:
    """Of vLLM servers; `elsewhere`: one can be on another host.

    Raises:
        DemoFailed: a package is missing.
    """
    from weightbus.cli.demo.vllm_kind import START_TOLD_S, VllmKind, serve_command

    kind = VllmKind(serve_command(), say)
    say(
        f"without a GPU every start of vLLM takes {START_TOLD_S} and 3 GB, two at a time: this is a"
    )
    say("demo of some four minutes on two idle cores")
    near = EngineSpec(engine="a", model="minilm", kind=kind)
    late = EngineSpec(engine="b", model="minilm", kind=kind, host="host-b" if elsewhere else "")

    async def tell(story: Story, fleet: Fleet, say: Say) -> None:
        await kind.begin(fleet, late)  # a second core would idle; it is followed later
        await _tell_vllm(story, fleet, say, near, late)

    return Script(tell, ("local", "p2p"))


async def _tell(story: Story, fleet: Fleet, say: Say) -> None:
    """Four versions by three routes; one engine comes late, one is killed and comes back."""
    say(STARTING)
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


async def _tell_local(story: Story, fleet: Fleet, say: Say) -> None:
    """The same on one host, where the libraries of the other routes are missing."""
    say(STARTING)
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


async def _tell_vllm(
    story: Story, fleet: Fleet, say: Say, near: EngineSpec, late: EngineSpec
) -> None:
    """Four versions in vLLM servers; one comes late, one is killed and comes back."""
    await fleet.start_trainer()
    await story.start((near,))
    say("a shares the trainer's host: its worker reads the trainer's memory in place")
    await _step(story, 1, (near,), decoder=False)
    say("the first version went through vLLM's own loader: what was then found as it had been sent")
    say("is written in place from now on; what vLLM repacks goes through its loader every time")
    second = await _step(story, 2, (near,), decoder=False)

    where = "on a host of its own: it pulls by p2p" if late.host else "beside a"
    say(f"engine b joins, late, {where}; its server has been loading meanwhile")
    await story.start((late,))
    await story.check(late, second)

    say("engine a is killed (SIGKILL: server and consumer), and a version is published without it")
    await fleet.kill(near.engine)
    missed = await _step(story, 3, (late,), decoder=False)
    say("engine a starts again, with random weights, and catches up")
    await story.start((near,))
    await story.check(near, missed)

    await _step(story, 4, (near, late), decoder=False)


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
