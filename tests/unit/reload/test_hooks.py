"""What an engine's host says beside its model, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.reload.models import Bag, ModuleHost, same_bits
from tests.unit.reload.test_worker import Fused, load_fused, make_client, make_tensors
from tests.unit.transfer.publishing import Trainer, cut_layout, open_trainer
from weightbus.consumers.errors import CheckpointRefused, TraceRefused
from weightbus.consumers.reload.host import Weights
from weightbus.consumers.reload.tracer import trace_needs
from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs


class TellingHost(ModuleHost):
    """Says what it was told to."""

    why_unwritten = ""
    refusal = ""
    keeps: Mapping[str, str] = {}

    def unwritten(self, parameter: str) -> str:
        return self.why_unwritten

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
