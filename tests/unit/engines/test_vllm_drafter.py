"""A target and its drafter as one model, without vLLM."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from weightbus.consumers.engines.vllm.drafter import Joint, share_as, tie_as


class Target(nn.Module):
    """Takes what is named as one of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 3, bias=False)
        self.head = nn.Linear(2, 3, bias=False)
        self.seen: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.named_parameters())
        for name, tensor in weights:
            self.seen.append(name)
            if name in own:
                own[name].data.copy_(tensor)


class Draft(Target):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(2, 2, bias=False)


def sharing() -> Joint:
    """As vLLM leaves them: the drafter uses its target's embeddings and head."""
    joint = Joint(Target(), Draft())
    assert isinstance(joint.draft, Draft)
    assert isinstance(joint.target, Target)
    joint.draft.embed = joint.target.embed
    joint.draft.head = joint.target.head
    return joint


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


WEIGHTS = {
    "embed.weight": torch.full((3, 2), 1.0),
    "head.weight": torch.full((3, 2), 2.0),
    "block.weight": torch.full((2, 2), 3.0),
}


def seen(model: nn.Module) -> list[str]:
    assert isinstance(model, Target)
    return model.seen


def test_both_are_given_the_whole_checkpoint_when_it_is_not_known_what_the_drafter_is_made_of() -> (
    None
):
    joint = sharing()
    joint.load_weights(iter(WEIGHTS.items()))
    assert seen(joint.target) == seen(joint.draft) == [*WEIGHTS]
    found = dict(joint.named_parameters(remove_duplicate=False))
    assert torch.equal(found["draft.block.weight"], WEIGHTS["block.weight"])
    assert torch.equal(found["draft.head.weight"], WEIGHTS["head.weight"])


def test_drafter_is_given_only_what_it_alone_is_made_of_when_that_is_known() -> None:
    joint = sharing()
    joint.drafted = frozenset({"block.weight"})
    joint.load_weights(iter(WEIGHTS.items()))
    assert seen(joint.target) == [*WEIGHTS]
    assert seen(joint.draft) == ["block.weight"]


def test_scratch_drafter_shares_what_the_live_one_does() -> None:
    live, scratch = sharing(), Joint(Target(), Draft())
    assert names(live) != names(scratch)
    share_as(live, scratch)
    assert names(live) == names(scratch)
    assert scratch.get_submodule("draft.embed") is scratch.get_submodule("target.embed")
    assert scratch.get_submodule("draft.block") is not live.get_submodule("draft.block")


def test_scratch_drafter_keeps_its_own_when_the_live_one_has_its_own() -> None:
    live, scratch = Joint(Target(), Draft()), Joint(Target(), Draft())
    share_as(live, scratch)
    assert names(live) == names(scratch)
    assert "draft.embed.weight" in names(scratch)


def test_parameters_are_tied_as_in_the_live_model() -> None:
    live, scratch = Target(), Target()
    live.head.weight = live.embed.weight
    assert tie_as(live, scratch) == [("embed.weight", "head.weight")]
    assert scratch.head.weight is scratch.embed.weight
    assert tie_as(live, scratch) == []


def test_nothing_is_tied_when_nothing_is() -> None:
    live, scratch = Target(), Target()
    assert tie_as(live, scratch) == []
    assert scratch.head.weight is not scratch.embed.weight


def test_parameters_without_elements_are_not_taken_for_tied() -> None:
    live, scratch = Target(), Target()
    for layer in (live.embed, live.head):
        layer.weight = nn.Parameter(torch.empty(0))
    assert tie_as(live, scratch) == []
