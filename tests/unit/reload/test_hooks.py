"""What an engine's host says beside its model, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.reload.models import Bag, ModuleHost, random_tensor, same_bits
from tests.unit.reload.test_feeds import open_feeder
from tests.unit.reload.test_worker import Fused, load_fused, make_client, make_tensors
from tests.unit.transfer.publishing import Trainer, cut_layout, open_trainer
from weightbus.consumers.errors import CheckpointRefused, ProofFailed, TraceRefused
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.tracer import trace_needs
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs


class TellingHost(ModuleHost):
    """Says what it was told to."""

    why_unwritten = ""
    padding: Mapping[str, int] = {}
    dropped: frozenset[str] = frozenset()
    refusal = ""
    keeps: Mapping[str, str] = {}

    def unwritten(self, parameter: str) -> str:
        return self.why_unwritten

    def padding_bytes(self, parameter: str) -> int:
        return self.padding.get(parameter, 0)

    def drops(self, parameter: str) -> bool:
        return parameter in self.dropped

    def check_needs(self, needs: Needs, layout: Layout) -> None:
        if self.refusal:
            raise CheckpointRefused(self.name, f"{len(needs.copies)} copies: {self.refusal}")

    def derived(self) -> Mapping[str, str]:
        return self.keeps


def load_half(model: Any, weights: Weights) -> None:
    for _, weight in weights:
        model.weight.data[:2].copy_(weight)


@pytest.fixture
def halved() -> tuple[TellingHost, Layout]:
    host = TellingHost(lambda: Bag(weight=(4, 3)), load_half)
    return host, cut_layout({"half": torch.zeros(2, 3)})


def test_layout_is_refused_when_the_host_knows_why_a_parameter_is_not_written(
    halved: tuple[TellingHost, Layout],
) -> None:
    host, layout = halved
    with pytest.raises(TraceRefused, match="weight: 24 of its bytes are not written"):
        trace_needs(host, layout)
    host.why_unwritten = "the other half is missing"
    with pytest.raises(CheckpointRefused, match=r"24 of its bytes .* the other half is missing"):
        trace_needs(host, layout)


def test_parameter_is_not_missed_when_the_engine_drops_it_and_nothing_is_written_to_it(
    halved: tuple[TellingHost, Layout],
) -> None:
    host, layout = halved
    host.dropped = frozenset(("weight",))
    with pytest.raises(TraceRefused, match="weight: 24 of its bytes are not written"):
        trace_needs(host, layout)  # a part of it is

    def load_other(model: Any, weights: Weights) -> None:
        for _, weight in weights:
            model.other.data.copy_(weight)

    host = TellingHost(lambda: Bag(other=(2, 3), scale=(1,)), load_other)
    with pytest.raises(TraceRefused, match="scale: 4 of its bytes are not written"):
        trace_needs(host, layout)
    host.dropped = frozenset(("scale",))
    traced = trace_needs(host, layout)
    assert [parameter.name for parameter in traced.needs.parameters] == ["other"]


def test_layout_is_refused_when_the_host_does_not_like_what_was_traced() -> None:
    host = TellingHost(Fused, load_fused)
    layout = cut_layout(make_tensors(0))
    trace_needs(host, layout)
    host.refusal = "too few"
    with pytest.raises(CheckpointRefused, match="4 copies: too few"):
        trace_needs(host, layout)


def test_refusal_of_the_recorder_is_not_taken_for_the_checkpoints_fault() -> None:
    """A host may take every error of its engine's loader for one of the checkpoint."""

    def load(model: Any, weights: Weights) -> None:
        try:
            for _, weight in weights:
                weight.zero_()
        except RuntimeError as error:
            raise CheckpointRefused("Test", str(error)) from error

    host = TellingHost(lambda: Bag(weight=(2,)), load)
    with pytest.raises(TraceRefused, match="changes a checkpoint tensor in place"):
        trace_needs(host, cut_layout({"a": torch.zeros(2)}))


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    with open_trainer(cut_layout(make_tensors(0)), "files", tmp_path) as trainer:
        yield trainer


@pytest.mark.parametrize(
    ("keeps", "processed"), [({"head": "packed"}, 1), ({"": "packed"}, 3), ({"other": "x"}, 0)]
)
def test_module_is_processed_when_its_host_says_that_it_keeps_copies(
    trainer: Trainer, keeps: Mapping[str, str], processed: int
) -> None:
    host = TellingHost(Fused, load_fused)
    host.keeps = keeps
    client = make_client(trainer, host)
    client.apply(make_tensors(10), 1)
    applied = client.apply(make_tensors(20), 2)
    assert (applied.direct_parameters, applied.processed_parameters) == (3 - processed, processed)
    if processed:
        assert "derives packed from weights" in applied.reason


def test_what_lies_below_a_module_is_processed_when_processing_gave_it_a_parameter(
    trainer: Trainer,
) -> None:
    """As latent attention does, of a projection that hangs below it."""

    def process(model: nn.Module) -> None:
        made: Any = model
        absorbed = made.head.weight.data.t()
        if not hasattr(made, "absorbed"):
            made.absorbed = nn.Parameter(absorbed.clone(), requires_grad=False)
        made.absorbed.data.copy_(absorbed)

    host = TellingHost(Fused, load_fused, process=process)
    client = make_client(trainer, host)
    client.apply(make_tensors(10), 1)
    assert client.apply(make_tensors(20), 2).processed_parameters == 3
    live: Any = host.live
    assert same_bits(live.absorbed, live.head.weight.t())


class Doubling(ModuleHost):
    """Its engine keeps the double of a weight, made in its own memory when it is asked."""

    def __init__(self) -> None:
        super().__init__(Fused, load_fused)
        self.doubled = torch.zeros(5, dtype=torch.bfloat16)
        self.is_known = True
        self.calls: list[str] = []
        self.on_synchronize = lambda: self.calls.append("synchronize")

    def renew(self) -> bool:
        self.calls.append("renew")
        if not self.is_known:
            raise ProofFailed("norm", "keeps a copy")
        self.doubled.copy_(2 * self.live.get_parameter("norm.weight"))
        return True

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        assert same_bits(self.doubled, 2 * tensors["norm"])
        assert self.calls[-3:] == ["synchronize", "renew", "synchronize"]


def test_copies_are_renewed_whichever_way_a_version_comes(tmp_path: Path) -> None:
    host = Doubling()
    with open_feeder(host, make_tensors(0), tmp_path) as feeder:
        for version, processed in ((1, 3), (2, 0)):
            tensors = make_tensors(10 * version)
            assert feeder.client.apply(tensors, version).processed_parameters == processed
            host.check(tensors)
        tensors = make_tensors(30)
        assert feeder.streamed(tensors, 3, 1024, 2, 1).direct_parameters == 3
        host.check(tensors)


def test_version_fails_when_a_copy_cannot_be_renewed(tmp_path: Path) -> None:
    host = Doubling()
    with open_feeder(host, make_tensors(0), tmp_path) as feeder:
        client = feeder.client
        client.apply(make_tensors(10), 1)
        host.is_known = False
        failed = client.fail(client.request(client.trainer.publish(make_tensors(20), 2), 2))
        assert (failed.error, failed.touched) == ("ProofFailed", True)
        host.is_known = True
        client.apply(make_tensors(30), 3)
        host.check(make_tensors(30))


class Padded(nn.Module):
    """Experts that are larger than the checkpoint's, beside what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Bag(torch.float32, weight=(4, 8))
        self.experts.get_parameter("weight").data.zero_()
        self.head = Bag(torch.float32, weight=(3, 7))


def load_padded(model: Any, weights: Weights) -> None:
    for name, weight in weights:
        if name == "head":
            model.head.weight.data.copy_(weight)
        else:
            model.experts.weight.data[:, : weight.shape[1]].copy_(weight)


def padded_tensors(seed: int, columns: int = 6) -> dict[str, torch.Tensor]:
    return {
        "experts": random_tensor((4, columns), torch.float32, seed),
        "head": random_tensor((3, 7), torch.float32, seed + 1),
    }


PADDING_BYTES = 4 * 2 * 4


def test_only_what_is_padded_goes_through_the_engines_loader(tmp_path: Path) -> None:
    host = TellingHost(Padded, load_padded)
    host.padding = {"experts.weight": PADDING_BYTES}
    with open_trainer(cut_layout(padded_tensors(0)), "files", tmp_path) as trainer:
        client = make_client(trainer, host)
        for version in (1, 2, 3):
            tensors = padded_tensors(10 * version)
            applied = client.apply(tensors, version)
            expected: Any = Padded()
            load_padded(expected, tensors.items())
            for name, want in expected.named_parameters():
                assert same_bits(host.live.get_parameter(name), want)
        assert (applied.direct_parameters, applied.processed_parameters) == (1, 1)
        assert "experts.weight is larger than what the checkpoint has of it" in applied.reason
        assert [given for _, given in host.reloads] == [("experts", "head"), *[("experts",)] * 2]
        client.worker.close()


def test_model_is_not_traced_when_more_is_missing_than_the_padding() -> None:
    host = TellingHost(Padded, load_padded)
    host.padding = {"experts.weight": PADDING_BYTES}
    assert trace_needs(host, cut_layout(padded_tensors(0))).padded == {"experts.weight"}
    for columns in (5, 7):
        with pytest.raises(TraceRefused, match=r"experts\.weight: .* are not written"):
            trace_needs(host, cut_layout(padded_tensors(0, columns)))
    host.why_unwritten = "a tensor is missing"
    with pytest.raises(CheckpointRefused, match="a tensor is missing"):
        trace_needs(host, cut_layout(padded_tensors(0, 5)))
