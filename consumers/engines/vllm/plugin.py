"""The entry point that vLLM calls in every one of its processes (`vllm.general_plugins`).

Owns nothing. Names the weight-transfer backend; its module is imported when a worker makes it.
"""

from __future__ import annotations

from contextlib import suppress

__all__ = ("BACKEND", "register")

BACKEND = "weightbus"
"""As in `--weight-transfer-config '{"backend": "weightbus"}'`."""


def register() -> None:
    """Let vLLM make our backend. May be called again, and where vLLM has no backends."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        return
    with suppress(ValueError):  # it is registered
        WeightTransferEngineFactory.register_engine(
            BACKEND, "weightbus.consumers.engines.vllm.backend", "WeightBusBackend"
        )
