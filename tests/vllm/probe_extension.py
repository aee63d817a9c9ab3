"""The probe, and Weight bus by its worker extension instead of vLLM's weight-transfer backends.

Imported in vLLM's workers only.
"""

from __future__ import annotations

from typing import Final

from tests.vllm.probe import Probe
from weightbus.consumers.engines.vllm.extension import WeightBusExtension

__all__ = ("PROBE_EXTENSION", "ProbeExtension")

PROBE_EXTENSION: Final = "tests.vllm.probe_extension.ProbeExtension"


class ProbeExtension(Probe, WeightBusExtension):
    """`self` is the worker."""
