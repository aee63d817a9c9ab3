"""What an engine's adapter gives to the reload machinery, inside the engine's own worker process.

Does no I/O. One `ModelHost` stands for one rank's model. Everything else about updating it
(tracing, proof, plan, move, digest) is engine-independent and lives beside this file.

Every method is called on the worker's main thread, by `ReloadWorker` only, and never while a
forward pass runs if it changes the live model; `device` and `live_model` are also asked for on the
thread that prepares, beside forward passes. Whatever a method raises becomes a `Failed` reply.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from weightbus.schemas.layout import Layout
from weightbus.schemas.needs import Needs

__all__ = ("ModelHost", "Weights")

Weights = Iterable[tuple[str, torch.Tensor]]
"""Checkpoint tensors by name. Made while they are iterated over, once."""


class ModelHost(ABC):
    """One rank's model inside an engine, and the engine's own ways to load it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the model's architecture, for messages."""

    @property
    @abstractmethod
    def device(self) -> str:
        """Where the live parameters are: `cpu`, `cuda:0`, ..."""

    @abstractmethod
    def live_model(self) -> nn.Module:
        """The model that serves. Its parameters are written in place."""

    @abstractmethod
    def scratch_model(self) -> nn.Module:
        """A new model of the same architecture, rank and world size on `meta`.

        As the engine builds it before loading: not processed afterwards. Building it leaves the
        live model and the engine's registries as they are. It must start with the same parameter
        names, shapes, strides and ties that the live model had when it was built.

        Raises:
            TraceRefused: it cannot be built there.
        """

    @abstractmethod
    def load_weights(self, model: nn.Module, weights: Weights) -> None:
        """The engine's mapping of checkpoint tensors to the parameters of `model` (a scratch one).

        Only the mapping (`model.load_weights(weights)`), without what an engine does afterwards.
        The weights are in the layout's order.

        Raises:
            CheckpointRefused: these tensors do not make the model; no version of this layout is
                taken. Whatever else it raises means that it cannot be traced.
        """

    @abstractmethod
    def reload(self, weights: Weights, modules: frozenset[str] | None) -> None:
        """Load the live model by the engine's own reload lifecycle, post-processing included.

        `weights` are private copies, in main memory unless `takes_device_tensors` says otherwise:
        the engine may keep or change them. `modules` None means
        the whole checkpoint; else `weights` are exactly the tensors that these modules (names as
        in `named_modules`) are made of, and no other module may be left changed.
        They are made as they are asked for, and can be asked for until this returns. Those that go
        to the same modules come one after the other, in the layout's order, if that is known.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Returns when the device has done everything that was asked of it."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory of the device that staging may take now."""

    def note_discarded(self) -> None:
        """What the engine has loaded is gone: until a version is written, weights, and what the
        engine has made of them, may hold anything. Called before anything else."""
        return

    def renew(self) -> bool:
        """Make anew what the engine has made of its weights once and keeps.

        Called whenever a version has been written, with the device synchronised.

        Returns:
            Whether there is any; what the device does for it may be under way.

        Raises:
            ProofFailed: it is not known what it is made of; the version must not be served.
        """
        return False

    def takes_device_tensors(self) -> bool:
        """Whether `reload` may be given tensors on `device`: it loads the same bits of them as of
        tensors in main memory, but for what it computes by `exp`, of which it is given the latter.
        """
        return False

    def may_stay_uncovered(self, buffer: str, *, persistent: bool) -> bool:
        """Whether a buffer that `load_weights` does not write is known not to be of the checkpoint.

        `persistent` says whether it would be in a `state_dict`. For parameters see `drops`.
        """
        del buffer
        return not persistent

    def unwritten(self, parameter: str) -> str:
        """Why a parameter that `load_weights` does not write whole has to come of the checkpoint.

        Asked for right after `load_weights`. Not empty: the layout does not make the model, and no
        version of it is taken. Empty: that is not known, and the model cannot be traced.
        """
        del parameter
        return ""

    def drops(self, parameter: str) -> bool:
        """Whether the engine goes without a parameter once it has loaded its weights: one that
        `load_weights` does not write at all has a value of the engine's own, and is not missed.

        Asked for when `unwritten` has nothing against it.
        """
        del parameter
        return False

    def padding_bytes(self, parameter: str) -> int:
        """How many bytes of a parameter no checkpoint has, since the engine has made it larger.

        Asked for right after `load_weights`. If it leaves just so many unwritten, the module goes
        through the engine's own reload in every update.
        """
        del parameter
        return 0

    def check_needs(self, needs: Needs, layout: Layout) -> None:
        """Look at what was traced, for what `load_weights` takes without a word.

        Raises:
            CheckpointRefused: the layout does not make the model.
        """
        del needs, layout

    def derived(self) -> Mapping[str, str]:
        """Modules that keep what they derive of their weights elsewhere than in tensors that hang
        on them, and where: asked for after a `reload` of the whole checkpoint.

        Of a module that is named, nothing is ever written directly, nor of the modules below it.
        """
        return {}
