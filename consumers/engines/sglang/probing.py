"""Whether a running SGLang is one that can be updated, told by what it says of itself. No I/O.

What it has is read from `/openapi.json`, how it was started from `/server_info`. Fields that a
version of SGLang does not have are of features that it does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from weightbus.consumers.engines.sglang.payload import LOADER
from weightbus.consumers.errors import EngineUnavailable

__all__ = ("check_operations", "check_started_as", "ranks_of")

MAX_RANKS: Final = 4096

_NEEDED: Final = (
    "/continue_generation",
    "/flush_cache",
    "/model_info",
    "/pause_generation",
    "/server_info",
    "/update_weight_version",
    "/update_weights_from_tensor",
)

Allowed = Callable[[Any], bool]


def _is_off(value: Any) -> bool:
    return value in (None, False, 0, "", "off", "null", "none", [], {})


def _at_most(limit: float) -> Allowed:
    return lambda value: _is_off(value) or (isinstance(value, int | float) and value <= limit)


_REFUSED: Final[tuple[tuple[str, Allowed, str], ...]] = (
    ("dp_size", _at_most(1), "start every copy of a data-parallel engine as a server of its own"),
    ("attn_dp_size", _at_most(1), "data-parallel attention gives its ranks turns of their own"),
    ("enable_dp_attention", _is_off, "data-parallel attention gives its ranks turns of their own"),
    ("pp_size", _at_most(1), "pipeline stages take their turns one after the other"),
    ("nnodes", _at_most(1), "every rank must be on this host"),
    ("tokenizer_worker_num", _at_most(1), "a pause must reach all of the server"),
    ("speculative_algorithm", _is_off, "its drafter would keep the old weights"),
    ("enable_lora", _is_off, "its layers are wrapped"),
    ("enable_memory_saver", _is_off, "SGLang does not tell whether it has let go of its weights"),
    ("weight_cache_mode", _is_off, "its weights are shared with other engines"),
    ("cpu_offload_gb", _at_most(0), "its weights are not all on its device"),
    ("offload_group_size", _at_most(0), "its weights are not all on its device"),
    ("enable_eplb", _is_off, "it moves experts between its ranks"),
    ("elastic_ep_backend", _is_off, "it moves experts between its ranks"),
    ("torchao_config", _is_off, "its parameters are not plain tensors"),
    ("rl_quant_profile", _is_off, "it has a loader of its own for updates"),
    ("disaggregation_mode", _is_off, "keys and values of old weights would come from elsewhere"),
    ("hicache_storage_backend", _is_off, "a flush leaves what is stored there"),
    ("enable_lmcache", _is_off, "a flush leaves what is stored there"),
)
"""Field of `/server_info`, which of its values will do, and why no other."""


def check_operations(engine: str, openapi: Mapping[str, Any]) -> None:
    """
    Raises:
        EngineUnavailable: this SGLang lacks an endpoint, or cannot pause as it must.
    """
    paths = openapi.get("paths")
    paths = paths if isinstance(paths, dict) else {}
    missing = [path for path in _NEEDED if path not in paths]
    if missing:
        raise EngineUnavailable(
            engine, f"this SGLang has no {', '.join(missing)}: take a newer one"
        )
    pause = paths["/pause_generation"]
    if not isinstance(pause, dict) or "requestBody" not in pause.get("post", {}):
        raise EngineUnavailable(
            engine,
            "this SGLang knows one way to pause, which ends every request: take a newer one",
        )


def check_started_as(engine: str, server_info: Mapping[str, Any]) -> None:
    """
    Raises:
        EngineUnavailable: it was not started with our loader, or with something that an update
            cannot be right beside.
    """
    loaders = server_info.get("custom_weight_loader")
    if not isinstance(loaders, list) or LOADER not in loaders:
        raise EngineUnavailable(
            engine,
            f"start it, with weightbus installed beside it, with --custom-weight-loader {LOADER}",
        )
    for field, will_do, reason in _REFUSED:
        value = server_info.get(field)
        if not will_do(value):
            raise EngineUnavailable(engine, f"it was started with {field}={value!r}: {reason}")


def ranks_of(engine: str, server_info: Mapping[str, Any]) -> int:
    """How many workers it has.

    Raises:
        EngineUnavailable: it does not say.
    """
    ranks = server_info.get("tp_size")
    if not isinstance(ranks, int) or isinstance(ranks, bool) or not 1 <= ranks <= MAX_RANKS:
        raise EngineUnavailable(
            engine, f"it says tp_size={ranks!r}: 1 to {MAX_RANKS} are supported"
        )
    return ranks
