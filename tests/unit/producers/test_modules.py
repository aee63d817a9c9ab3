"""A module as a part: names without wrappers, ties once, and plain tensors on one rank each."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from weightbus.producers.errors import RankInvalid, TensorInvalid
from weightbus.producers.fused import Split, Window
from weightbus.producers.modules import plan_module
from weightbus.producers.shards import Part
from weightbus.schemas.layout import TensorSpec
from weightbus.schemas.layout_codec import check_layout


class Net(nn.Module):
    """With all that a walk may stumble over: its own `module`, a tie, buffers, and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
        self.absent: nn.Module | None = None
        self.register_module("none", None)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int32))
        self.register_buffer("cache", torch.zeros(5), persistent=False)
        self.register_buffer("nothing", None)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.head(self.module(self.embed(indices)) * self.scale)  # type: ignore[no-any-return]


def names_of(part: Part) -> list[str]:
    return [spec.name for spec in part.layout.tensors]


def saved_names(module: nn.Module) -> list[str]:
    """Of a state dict, but for the second name of what is tied."""
    return [name for name in module.state_dict() if name != "head.weight"]


def checkpointed(module: nn.Module) -> nn.Module:
    assert isinstance(module, Net)
    module.module = checkpoint_wrapper(module.module)  # type: ignore[assignment]
    return checkpoint_wrapper(module)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        torch.compile,
        nn.DataParallel,
        checkpointed,
        DistributedDataParallel,
        lambda m: torch.compile(DistributedDataParallel(checkpointed(m))),
    ],
    ids=["plain", "compiled", "data_parallel", "checkpointed", "ddp", "all"],
)
def test_names_are_those_of_the_module_when_it_is_wrapped(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    module = Net()
    expected = saved_names(module)
    part = plan_module(wrap(module))
    assert sorted(names_of(part)) == sorted(expected)
    assert "module.0.weight" in expected
    check_layout(part.layout)


def test_values_are_those_of_now_when_the_optimizer_has_stepped() -> None:
    module = Net()
    part = plan_module(module)
    with torch.no_grad():
        module.get_parameter("module.0.weight").fill_(3.0)
    number = names_of(part).index("module.0.weight")
    assert bool((part.sources[number] == 3.0).all())


def test_tied_parameters_are_published_once_under_the_first_name() -> None:
    module = nn.ModuleDict({"b": nn.Linear(2, 3), "a": nn.Linear(2, 3)})
    module["a"].weight = module["b"].weight
    shared = nn.BatchNorm1d(3)
    module["first"], module["second"] = shared, shared
    names = names_of(plan_module(module))
    assert names[:3] == ["b.weight", "b.bias", "a.bias"]
    assert all(name.startswith("first.") for name in names[3:])
    assert len(names) == 8


def test_buffers_are_left_out_when_none_are_wanted() -> None:
    every = set(names_of(plan_module(Net())))
    assert every - set(names_of(plan_module(Net(), buffers="none"))) == {
        "steps",
        "module.1.running_mean",
        "module.1.running_var",
        "module.1.num_batches_tracked",
    }
    assert "cache" not in every


@pytest.mark.parametrize("seed", range(5))
def test_ranks_hold_every_plain_tensor_once_and_about_as_many_bytes(seed: int) -> None:
    chosen = random.Random(seed)
    ranks = chosen.randint(1, 9)
    module = nn.ParameterDict(
        {
            f"p{n}": nn.Parameter(torch.zeros(chosen.randint(0, 4000) * (n % 9 > 0)))
            for n in range(60)
        }
    )
    parts = [plan_module(module, rank=rank, world_size=ranks) for rank in range(ranks)]
    assert all(names_of(part) == [*module] for part in parts), "empty ones, too, are not tied"
    held = Counter(shard.tensor for part in parts for shard in part.layout.shards)
    filled = [n for n, p in enumerate(module.values()) if p.numel()]
    assert held == dict.fromkeys(filled, 1), f"seed {seed}, {ranks} ranks"
    loads = [part.size_bytes for part in parts]
    largest = max(p.nbytes for p in module.values())
    assert max(loads) - min(loads) <= largest, (seed, loads)
    assert sum(loads) == sum(p.nbytes for p in module.values())


def test_ranks_deal_by_what_is_published_when_it_is_cast() -> None:
    module = nn.Module()
    module.register_buffer("ints", torch.zeros(100, dtype=torch.int32))
    module.register_buffer("floats", torch.zeros(150))
    module.register_buffer("more", torch.zeros(50))
    sizes = [
        plan_module(module, rank=rank, world_size=2, dtype=torch.bfloat16).size_bytes
        for rank in (0, 1)
    ]
    assert sizes == [400, 400]


def test_parameters_are_cast_and_stay_as_they_are_when_a_dtype_is_given() -> None:
    module = Net().double()
    part = plan_module(module, dtype=torch.bfloat16)
    dtypes = {spec.name: spec.dtype for spec in part.layout.tensors}
    assert dtypes.pop("steps") == "I32"
    assert dtypes.pop("module.1.num_batches_tracked") == "I64"
    assert set(dtypes.values()) == {"BF16"}
    assert module.embed.weight.dtype == torch.float64


def test_fused_tensors_are_cut_when_a_split_is_given() -> None:
    def split(name: str, shape: tuple[int, ...]) -> list[Window] | None:
        if name != "0.weight":
            return None
        assert shape == (4, 3)
        half = (2, 3)
        return [Window("gate", half, (0, 0), half), Window("up", half, (2, 0), half)]

    def cast(name: str) -> torch.dtype | None:
        return {"gate": None, "up": torch.float64, "0.bias": None}[name]

    module = nn.Sequential(linear := nn.Linear(3, 4))
    parts = [
        plan_module(module, split=split, dtype=cast, rank=rank, world_size=2) for rank in (0, 1)
    ]
    specs = (TensorSpec("gate", "F32", (2, 3)), TensorSpec("up", "F64", (2, 3)))
    assert all(part.layout.tensors[:2] == specs for part in parts)
    assert [len(part.layout.shards) for part in parts] == [2, 1]
    for number, rows in enumerate((slice(0, 2), slice(2, 4))):
        assert torch.equal(parts[0].sources[number], linear.weight[rows])


@pytest.mark.parametrize("rank", [-1, 2])
def test_rank_is_refused_when_it_is_not_of_the_world(rank: int) -> None:
    with pytest.raises(RankInvalid, match="must be 0 to 1, world_size being 2"):
        plan_module(Net(), rank=rank, world_size=2)


def test_fsdp1_is_refused_by_name_with_the_way_out() -> None:
    wrapped: Any = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped._fsdp_wrapped_module = nn.Linear(2, 2)
    with pytest.raises(TensorInvalid, match=r"layer is wrapped in Fully.*fully_shard \(FSDP2\)"):
        plan_module(nn.ModuleDict({"layer": wrapped}))


def test_zero3_is_refused_by_name_with_the_way_out() -> None:
    module = nn.Linear(2, 2)
    module.bias.data = torch.zeros(0)
    module.bias.ds_shape = torch.Size([2])  # type: ignore[attr-defined]
    with pytest.raises(TensorInvalid, match=r"bias is partitioned by ZeRO-3.*ZeRO-2"):
        plan_module(module)


def test_module_is_refused_by_name_when_it_has_no_data() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    with pytest.raises(TensorInvalid, match="weight is on the meta device"):
        plan_module(module)


MOVED = "0.weight is in other memory than when it was planned: plan the module again"


def halves(name: str, shape: tuple[int, ...]) -> list[Window] | None:
    half = (2, 3)
    windows = [Window("a", half, (0, 0), half), Window("b", half, (2, 0), half)]
    return windows if name == "0.weight" else None


def renewed(module: nn.Module) -> None:
    module.get_submodule("0").weight = nn.Parameter(torch.zeros(4, 3))


def assigned(module: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def padded(module: nn.Module) -> None:
    """As FSDP2 does to uneven shards at the first forward pass, if torch is older."""
    weight: Any = module.get_parameter("0.weight")
    weight._local_tensor = weight._local_tensor.clone()


def moved(module: nn.Module) -> None:
    module.get_parameter("0.weight").data = torch.ones(4, 3)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("sharded", "split", "change"), [
    (False, None, renewed),
    (False, None, assigned),
    (False, halves, moved),
    (True, None, assigned),
    (True, None, padded),
    (True, halves, padded),
])  # fmt: skip
def test_part_is_refused_when_a_tensor_lies_in_other_memory_than_it_was_planned_in(
    sharded: bool, split: Split | None, change: Callable[[nn.Module], None]
) -> None:
    module = nn.Sequential(nn.Linear(3, 4))
    if sharded:
        fully_shard(module)
    for rank, world_size in ((0, 1), (1, 2)):
        part = plan_module(module, split=split, rank=rank, world_size=world_size)
        part.prepare()
        change(module)
        with pytest.raises(TensorInvalid, match=MOVED):
            part.prepare()
        plan_module(module, split=split).prepare()


def test_part_follows_a_plain_tensor_that_is_published_whole_to_other_memory() -> None:
    module = nn.Sequential(nn.Linear(3, 4))
    part = plan_module(module)
    moved(module)
    part.prepare()
    assert torch.equal(part.sources[0], torch.ones(4, 3))


@pytest.mark.usefixtures("group")
def test_part_stays_valid_when_fsdp_gathers_and_an_optimizer_steps() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    module.register_parameter("empty", nn.Parameter(torch.zeros(0, 3)))
    fully_shard(module, reshard_after_forward=False)
    part = plan_module(module)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        module(torch.ones(2, 3))
    assert not isinstance(module.get_parameter("0.weight"), DTensor), "it is gathered"
    part.prepare()
