"""The engines that `weightbus consume` stands beside: the options of each, and how it is opened.

Reads nothing but what it is given. A new kind of engine is a choice of its own here: a struct, its
options in `OPTIONS_OF` and `engine_options`, a branch of `choose_engine` and of `open_engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import urlsplit

import click
import msgspec
from click.core import ParameterSource
from msgspec import Struct

from weightbus.cli.options import device_option
from weightbus.consumers.engines.engine import Engine
from weightbus.consumers.engines.sglang.engine import SglangSettings, open_sglang_engine
from weightbus.consumers.engines.torch.engine import open_torch_engine
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.engines.vllm.engine import VllmSettings, open_vllm_engine

__all__ = (
    "ADMIN_KEY_VARIABLE",
    "KEY_VARIABLE",
    "OPTIONS_OF",
    "EngineChoice",
    "SglangChoice",
    "TorchChoice",
    "VllmChoice",
    "choose_engine",
    "engine_options",
    "open_engine",
)

KEY_VARIABLE: Final = "WEIGHTBUS_ENGINE_KEY"
"""Holds the server's API key: a command line is seen by every user of the host."""

ADMIN_KEY_VARIABLE: Final = "WEIGHTBUS_ENGINE_ADMIN_KEY"
"""Holds the key of an SGLang server that has another one for what changes it."""

OPTIONS_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "torch": ("architecture", "config", "tp", "device"),
    "vllm": ("url", "pause", "sleeping", "caches"),
    "sglang": ("url", "pause", "caches"),
}
"""Kind of engine -> the options that say something of it alone."""

_GIVEN: Final = frozenset({ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT})

F = TypeVar("F", bound=Callable[..., Any])


class TorchChoice(Struct, frozen=True):
    """A torch engine."""

    spawn: TorchEngineSpec | None = None
    """Started with the consumer, and owned by it; None: one that runs."""


class VllmChoice(Struct, frozen=True):
    """A vLLM server that runs on this host."""

    url: str
    settings: VllmSettings


class SglangChoice(Struct, frozen=True):
    """An SGLang server that runs on this host."""

    url: str
    settings: SglangSettings


EngineChoice: TypeAlias = TorchChoice | VllmChoice | SglangChoice


def engine_options(command: F) -> F:
    """The options of all kinds; the command gets them as keywords, for `choose_engine`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def choose_engine(
    context: click.Context, chosen: Mapping[str, Any], environment: Mapping[str, str]
) -> EngineChoice:
    """What the options of `engine_options` ask for.

    Raises:
        click.UsageError: they do not fit each other.
    """
    kind: str = chosen["engine"]
    _refuse_options_of_others(context, kind)
    if kind == "vllm":
        if chosen["url"] is None:
            raise click.UsageError(
                "--engine vllm needs --url, where `vllm serve` listens: http://127.0.0.1:8000"
            )
        settings = VllmSettings(
            pause=chosen["pause"],
            sleeping=chosen["sleeping"],
            caches=chosen["caches"],
            api_key=environment.get(KEY_VARIABLE, ""),
        )
        return VllmChoice(url=chosen["url"], settings=settings)
    if kind == "sglang":
        return _sglang(chosen, environment)
    if chosen["engine_dir"] is None and chosen["architecture"] is None:
        raise click.UsageError(
            "give --engine-dir of a running engine, or --architecture of a new one"
        )
    return TorchChoice(_spec(chosen))


def open_engine(
    choice: EngineChoice, directory: Path, *, roots: Sequence[str], host_id: str
) -> AbstractAsyncContextManager[Engine]:
    """The engine, once all its ranks answer; its sockets are in `directory`.

    Raises:
        EngineUnavailable: there is none, it did not start, or it has another consumer.
    """
    match choice:
        case TorchChoice(spawn=spawn):
            return open_torch_engine(directory, spawn=spawn, roots=roots, host_id=host_id)
        case VllmChoice(url=url, settings=settings):
            return open_vllm_engine(
                directory, url=url, settings=settings, roots=roots, host_id=host_id
            )
        case SglangChoice(url=url, settings=sglang_settings):
            return open_sglang_engine(
                directory, url=url, settings=sglang_settings, roots=roots, host_id=host_id
            )


def _sglang(chosen: Mapping[str, Any], environment: Mapping[str, str]) -> SglangChoice:
    if chosen["url"] is None:
        raise click.UsageError(
            "--engine sglang needs --url, where its server listens: http://127.0.0.1:30000"
        )
    if chosen["pause"] == "wait":
        raise click.UsageError("SGLang does not wait for requests in a pause: --pause keep, abort")
    settings = SglangSettings(
        pause=chosen["pause"],
        caches=chosen["caches"],
        api_key=environment.get(KEY_VARIABLE, ""),
        admin_key=environment.get(ADMIN_KEY_VARIABLE, ""),
    )
    return SglangChoice(url=chosen["url"], settings=settings)


def _refuse_options_of_others(context: click.Context, kind: str) -> None:
    for other, names in OPTIONS_OF.items():
        for name in names:
            given = context.get_parameter_source(name) in _GIVEN
            if given and name not in OPTIONS_OF[kind]:
                raise click.UsageError(
                    f"--{name} is an option of --engine {other}: this is --engine {kind}"
                )


def _spec(chosen: Mapping[str, Any]) -> TorchEngineSpec | None:
    if chosen["architecture"] is None:
        return None
    try:
        return TorchEngineSpec(
            architecture=chosen["architecture"],
            config=msgspec.json.decode(chosen["config"], type=dict),
            tp=chosen["tp"],
            device=chosen["device"],
        )
    except msgspec.MsgspecError as error:
        reason = f"{chosen['config']!r} of the torch engine: {error}"
        raise click.BadParameter(reason, param_hint="--config") from None


def _url(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    try:
        parts = urlsplit(value)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no URL: {error}") from None
    if not known or parts.query or parts.fragment:
        raise click.BadParameter(f"{value!r} must be such as http://127.0.0.1:8000")
    if parts.username is not None or parts.password is not None:
        raise click.BadParameter(f"credentials belong into {KEY_VARIABLE}, not into a URL")
    return value.rstrip("/")


_OPTIONS: Final = (
    click.option(
        "--engine", type=click.Choice(list(OPTIONS_OF)), default="torch", show_default=True
    ),
    click.option(
        "--engine-dir",
        type=click.Path(path_type=Path),
        help="Directory of the engine's sockets, of mode 0700. A new one by default, with vllm, "
        "sglang and --architecture.",
    ),
    click.option(
        "--architecture",
        type=click.Choice(["decoder", "minilm", "shapes"]),
        help="torch: start an engine of this architecture, and own it.",
    ),
    click.option("--config", default="{}", help="torch: configuration of the architecture (JSON)."),
    click.option(
        "--tp",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="torch: ranks of the engine that is started.",
    ),
    device_option,
    click.option(
        "--url",
        callback=_url,
        help="vllm, sglang: where its server listens, such as http://127.0.0.1:8000",
    ),
    click.option(
        "--pause",
        type=click.Choice(["keep", "wait", "abort"]),
        default="keep",
        show_default=True,
        help="vllm, sglang: what becomes of requests that run when an update comes: they go on "
        "afterwards, are waited for (vllm), or end.",
    ),
    click.option(
        "--sleeping",
        type=click.Choice(["refuse", "wake"]),
        default="refuse",
        show_default=True,
        help="vllm: what is done with updates while the engine sleeps.",
    ),
    click.option(
        "--caches",
        type=click.Choice(["reset", "keep"]),
        default="reset",
        show_default=True,
        help="vllm, sglang: what becomes of caches that older weights have filled.",
    ),
)
