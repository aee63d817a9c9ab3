"""Conversions are followed on tensors without data: their windows do what they do to real ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.unit.producers.assembling import assemble
from weightbus.producers.conversions import Tensors, windows_of
from weightbus.producers.errors import TensorInvalid
from weightbus.producers.fused import Window, cut
from weightbus.producers.shards import Shard

Convert = Callable[[Tensors], Tensors]

SHAPES = {"a": (4, 6, 2), "b": (4, 6, 2), "q": (5, 3), "k": (2, 3), "square": (4, 4), "one": (1, 3)}


def experts(t: Tensors) -> Tensors:
    halves = [half.contiguous() for half in t["a"].chunk(2, 1)]
    return {f"{e}.{h}": halves[h][e] for h in range(2) for e in range(4)}


CONVERSIONS: dict[str, Convert] = {
    "renamed": lambda t: {"w": t["a"], "v": t["q"]},
    "experts": experts,
    "squeezed": lambda t: {str(n): c.squeeze(0) for n, c in enumerate(t["a"].chunk(4, 0))},
    "joined": lambda t: {"qk": torch.cat([t["q"], t["k"]])},
    "joined in the second dimension": lambda t: {"w": torch.cat([t["a"], t["b"]], 1)},
    "stacked": lambda t: {"w": torch.stack([t["a"], t["b"]], 2)},
    "turned": lambda t: {"w": t["a"].permute(2, 0, 1).contiguous()},
    "turned where that shows in no shape": lambda t: {"w": t["square"].T.contiguous()},
    "turned, joined and joined": lambda t: {
        "w": torch.cat([torch.cat([t["q"], t["k"]]).clone(), t["one"].clone()])
    },
    "unsqueezed": lambda t: {"w": t["q"].unsqueeze(1).unsqueeze(0)},
    "of a dimension of one": lambda t: {"w": t["one"].T, "v": t["k"][:1], "u": t["k"][1]},
    "turned in place": lambda t: {"w": t["q"].view(5, 3).t_()},
    "reshaped as it was": lambda t: {"w": t["q"].reshape(5, 3)},
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_windows_do_what_a_conversion_does_when_ranks_cut_the_tensors(convert: Convert) -> None:
    shapes = used_by(convert)
    windows = windows_of(convert, shapes)
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    shards = []
    for name, tensor in state.items():
        for start in range(0, tensor.shape[0], 2):
            starts = (start, *(0,) * (tensor.ndim - 1))
            box = Shard(name, tensor[start : start + 2], shapes[name], starts)
            shards += cut(box, windows[name])
    found, expected = assemble(shards), convert(dict(state))
    assert found.keys() == expected.keys()
    for name, whole in expected.items():
        assert torch.equal(found[name], whole), name


def used_by(convert: Convert) -> dict[str, tuple[int, ...]]:
    used = {}

    class Noting(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            used[name] = SHAPES[name]
            return super().__getitem__(name)

    convert(Noting({name: torch.zeros(shape) for name, shape in SHAPES.items()}))
    return used


def test_windows_come_in_the_order_of_memory_when_the_conversion_has_another() -> None:
    (windows,) = windows_of(experts, {"a": SHAPES["a"]}).values()
    assert [window.name for window in windows[:3]] == ["0.0", "0.1", "1.0"]
    assert windows[3] == Window("1.1", (3, 2), (1, 3, 0), (1, 3, 2), (0, 0), (1, 2))


def second_half_twice(t: Tensors) -> Tensors:
    t["a"][:2].copy_(t["a"][2:])
    return {"w": t["a"]}


@pytest.mark.parametrize(
    ("convert", "named", "reason"),
    [
        (lambda t: {"w": t["a"] + 1}, "w", "aten.add"),
        (lambda t: {"w": t["a"].reshape(24, 2)}, "w", "dimension by dimension"),
        (lambda t: {"w": t["a"].view(4, 2, 3, 2)}, "w", "dimension by dimension"),
        (lambda t: {"w": t["a"].transpose(0, 1).reshape(24, 2)}, "w", "reshape"),
        (lambda t: {"w": t["a"][::2], "v": t["a"][1::2]}, "w", "dimension by dimension"),
        (lambda t: {"w": t["a"].flip(0)}, "w", "aten.flip"),
        (lambda t: {"w": torch.cat([t["a"], t["a"]])[:4]}, "w", "joined"),
        (lambda t: {"w": torch.cat([t["a"], t["a"]]).view(48, 2)}, "w", "joined"),
        (lambda t: {"w": t["a"].to(torch.bfloat16)}, "w", "aten._to_copy"),
        (lambda t: {"w": t["a"].expand(2, 4, 6, 2)}, "w", "dimension by dimension"),
        (lambda t: {"w": t["a"].unfold(0, 3, 1)}, "w", "dimension by dimension"),
        (lambda t: {"w": t["a"][1:]}, "a", "48 elements long|48 .* 36 of them"),
        (lambda t: {"w": t["a"], "v": t["a"]}, "a", "96 of them"),
        (lambda t: {}, "a", "0 of them"),
        (lambda t: {"w": t["a"].mul_(2)}, "w", "made by aten.mul_"),
        (lambda t: {"w": t["a"].clone().add_(1)}, "w", "made by aten.add_"),
        (lambda t: {"w": torch.mul(t["a"], 2, out=t["a"])}, "w", "made by aten.mul.out"),
        (lambda t: {"w": torch.cat([t["a"], t["a"]]).mul_(2)}, "w", "made by aten.mul_"),
        (second_half_twice, "w", "made by aten.copy_"),
        (lambda t: {"w": t["a"][:2], "v": t["a"][:2].squeeze(0)}, "a", "in w and in v, some"),
        (lambda t: {"w": t["a"][:, :4], "v": t["a"][:, 3:5]}, "a", "in w and in v, some"),
    ],
)
def test_conversion_is_refused_when_it_makes_something_else(
    convert: Convert, named: str, reason: str
) -> None:
    with pytest.raises(TensorInvalid, match=reason) as caught:
        windows_of(convert, {"a": SHAPES["a"]})
    assert caught.value.tensor == named
