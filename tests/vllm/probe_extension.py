"""The probe, and Weight bus by its worker extension instead of vLLM's weight-transfer backends.

Imported in vLLM's workers only.
"""

from __future__ import annotations

from typing import Final

from tests.vllm.probe import Probe
from weightbus.consumers.engines.vllm import extension

__all__ = ("PROBE_EXTENSION", "WeightBusExtension")

PROBE_EXTENSION: Final = "tests.vllm.probe_extension.WeightBusExtension"


class WeightBusExtension(Probe, extension.WeightBusExtension):
    """`self` is the worker. Consumers know the extension by this name."""
