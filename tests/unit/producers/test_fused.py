"""Windows of fused tensors met with the boxes of ranks: every element once, and no byte copied."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch

from tests.unit.producers.assembling import assemble
from weightbus.producers.errors import TensorInvalid
from weightbus.producers.fused import Window, cut
from weightbus.producers.shards import Shard, plan_part

EXPERTS, INNER, HIDDEN = 3, 5, 4

Cuts = tuple[tuple[int, ...], ...]
"""For each dimension where it is cut."""

CUTS: tuple[Cuts, ...] = (
    ((), (), ()),
    ((1, 2), (), ()),
    ((2,), (3, 5, 9), ()),
    ((), (4,), (1, 2, 3)),
)


def boxes(fused: torch.Tensor, cuts: Cuts) -> Iterator[Shard]:
    """The boxes of ranks that cut `fused` there, as aliases."""
    edges = [(0, *inner, extent) for inner, extent in zip(cuts, fused.shape, strict=True)]
    for spans in itertools.product(*map(itertools.pairwise, edges)):
        place = tuple(slice(low, high) for low, high in spans)
        yield Shard("fused", fused[place], tuple(fused.shape), tuple(low for low, _ in spans))


def experts_windows(at: int = 0) -> Sequence[Window]:
    return [
        Window(
            f"experts.{expert}.{name}",
            (INNER, HIDDEN),
            (expert, half * INNER, 0),
            (1, INNER, HIDDEN),
            (at, 0),
        )
        for expert in range(EXPERTS)
        for half, name in enumerate(("gate", "up"))
    ]


def random_experts() -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator)


@pytest.mark.parametrize("cuts", CUTS)
def test_experts_are_whole_when_ranks_cut_the_fused_tensor_anywhere(cuts: Cuts) -> None:
    fused = random_experts()
    shards = [piece for box in boxes(fused, cuts) for piece in cut(box, experts_windows())]
    found = assemble(shards)
    assert len(found) == 2 * EXPERTS
    for expert in range(EXPERTS):
        assert torch.equal(found[f"experts.{expert}.gate"], fused[expert, :INNER])
        assert torch.equal(found[f"experts.{expert}.up"], fused[expert, INNER:])
    plan_part(shards)


@pytest.mark.parametrize("cuts", CUTS)
def test_dimensions_are_turned_when_a_window_says_so(cuts: Cuts) -> None:
    fused = random_experts()
    windows = [Window("w", (HIDDEN, EXPERTS, 2 * INNER), (0, 0, 0), fused.shape, axes=(2, 0, 1))]
    found = assemble(piece for box in boxes(fused, cuts) for piece in cut(box, windows))
    assert torch.equal(found["w"], fused.permute(2, 0, 1))


def test_tensors_are_stacked_when_the_checkpoint_has_more_dimensions() -> None:
    layers = [torch.randn(4, 6), torch.randn(4, 6)]
    shards = []
    for number, layer in enumerate(layers):
        windows = [Window("w", (2, 4, 6), (0, 0), (4, 6), (number, 0, 0))]
        shards += [piece for box in boxes(layer, ((1,), (2, 3))) for piece in cut(box, windows)]
    assert torch.equal(assemble(shards)["w"], torch.stack(layers))


def test_tensors_are_joined_in_front_of_each_other_when_windows_lie_apart() -> None:
    q, k = torch.randn(4, 6), torch.randn(2, 6)
    shards = cut(Shard("q", q), [Window("qk", (6, 6), (0, 0), (4, 6))])
    shards += cut(Shard("k", k), [Window("qk", (6, 6), (0, 0), (2, 6), (4, 0))])
    assert torch.equal(assemble(shards)["qk"], torch.cat([q, k]))


def test_padding_is_left_out_when_no_window_holds_it() -> None:
    padded = torch.randn(8, 3)
    windows = [Window("w", (5, 3), (0, 0), (5, 3))]
    found = assemble(p for box in boxes(padded, ((4, 6), ())) for p in cut(box, windows))
    assert torch.equal(found["w"], padded[:5])
    assert cut(Shard("fused", padded[6:], (8, 3), (6, 0)), windows) == []
    assert cut(Shard("fused", padded), []) == []


def test_pieces_show_new_values_when_the_fused_tensor_changes() -> None:
    fused = torch.nn.Parameter(random_experts())
    pieces = cut(Shard("fused", fused), experts_windows())
    with torch.no_grad():
        fused.fill_(7)
    assert all(bool((piece.tensor == 7).all()) for piece in pieces)
    assert not any(piece.tensor.requires_grad for piece in pieces)


def test_scalar_is_renamed_when_its_window_has_no_dimension() -> None:
    (piece,) = cut(Shard("a", torch.tensor(3.0)), [Window("b", (), (), ())])
    assert (piece.name, piece.tensor.item(), piece.starts) == ("b", 3.0, ())


@pytest.mark.parametrize(
    ("window", "limit"),
    [
        (Window("w", (4, 4), (0,), (4,)), "as many dimensions"),
        (Window("w", (4, 4), (0, 0), (4, 4), (0,)), "as many dimensions"),
        (Window("w", (4, 4), (0, 0), (4, 4), axes=(0,)), "as many dimensions"),
        (Window("w", (4, 4), (1, 0), (4, 4)), "must lie inside"),
        (Window("w", (4, 4), (-1, 0), (4, 4)), "must lie inside"),
        (Window("w", (4, 4), (0, 0), (4, -1)), "must lie inside"),
        (Window("w", (4, 4), (0, 0), (4, 4), axes=(0, 0)), "at most once"),
        (Window("w", (4, 4), (0, 0), (4, 4), axes=(0, 2)), "at most once"),
        (Window("w", (4,), (0, 0), (2, 4)), "must be of size 1"),
        (Window("w", (4, 3), (0, 0), (4, 4)), "must lie inside w"),
        (Window("w", (6, 4), (0, 0), (4, 4), (3, 0)), "must lie inside w"),
        (Window("w", (6, 4), (0, 0), (4, 4), (-1, 0)), "must lie inside w"),
    ],
)
def test_window_is_refused_when_it_does_not_fit(window: Window, limit: str) -> None:
    with pytest.raises(TensorInvalid, match=limit) as caught:
        cut(Shard("fused", torch.zeros(4, 4)), [window])
    assert caught.value.tensor == "fused"
