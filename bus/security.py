"""TLS and credentials: what the settings name, checked, as arguments of nats-py's `connect`.

Files are read here once, so that a wrong one is refused by name. nats-py reads credentials again at
every connect (they may be renewed), and waits for ever on a file without a JWT.
"""

from __future__ import annotations

import importlib
import ssl
from pathlib import Path
from types import ModuleType
from typing import Any

from weightbus.bus.errors import SettingInvalid
from weightbus.bus.settings import BusSettings

__all__ = ("connect_arguments",)

_MAX_FILE_BYTES = 1 << 20


def connect_arguments(settings: BusSettings) -> dict[str, Any]:
    """Arguments for TLS and credentials; none if the settings name no file.

    Raises:
        SettingInvalid: a file cannot be used, or the package nkeys is missing.
    """
    arguments: dict[str, Any] = {}
    if (path := settings.credentials_file) is not None:
        _import_nkeys("credentials_file", path)
        text = _read_secret("credentials_file", path)
        for begin in (b"BEGIN NATS USER JWT", b"BEGIN USER NKEY SEED"):
            if begin not in text:
                raise SettingInvalid("credentials_file", str(path), f"has no {begin.decode()}")
        arguments["user_credentials"] = str(path)
    if (path := settings.nkey_seed_file) is not None:
        _check_seed(path, _read_secret("nkey_seed_file", path))
        arguments["nkeys_seed"] = str(path)
    if settings.tls_ca_file or settings.tls_cert_file:
        arguments["tls"] = _tls_context(settings)
    return arguments


def _read_secret(setting: str, path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise SettingInvalid(setting, str(path), f"cannot be read: {error.strerror}") from None


def _import_nkeys(setting: str, path: Path) -> ModuleType:
    """nats-py needs it for both kinds of credentials, and does not install it by itself."""
    try:
        return importlib.import_module("nkeys")
    except ImportError:
        raise SettingInvalid(
            setting, str(path), "needs the package nkeys: `pip install nats-py[nkeys]`"
        ) from None


def _check_seed(path: Path, text: bytes) -> None:
    nkeys = _import_nkeys("nkey_seed_file", path)
    try:
        nkeys.from_seed(bytearray(text.strip())).wipe()
    except (nkeys.NkeysError, ValueError):
        raise SettingInvalid("nkey_seed_file", str(path), "holds no nkey seed") from None


def _tls_context(settings: BusSettings) -> ssl.SSLContext:
    ca, cert, key = settings.tls_ca_file, settings.tls_cert_file, settings.tls_key_file
    setting, path = "tls_ca_file", ca
    try:
        context = ssl.create_default_context(cafile=str(ca) if ca else None)
        if cert is not None:
            setting, path = "tls_cert_file", cert
            context.load_cert_chain(str(cert), str(key) if key else None)
    except OSError as error:  # ssl.SSLError is one
        raise SettingInvalid(setting, str(path), f"cannot be used: {error}") from None
    return context
