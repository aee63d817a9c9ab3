"""Settings of the bus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from weightbus.bus.errors import SettingInvalid
from weightbus.bus.settings import BusSettings


def test_settings_are_the_defaults_when_the_environment_is_empty() -> None:
    assert BusSettings.from_env({"PATH": "/bin", "WEIGHTBUS_PORT": ""}) == BusSettings()


def test_settings_are_read_when_the_environment_has_them() -> None:
    settings = BusSettings.from_env(
        {
            "WEIGHTBUS_NATS_URL": "nats://one:4222,nats://two:4222",
            "WEIGHTBUS_NATS_SERVER": "/opt/nats-server",
            "WEIGHTBUS_DATA_DIR": "/data",
            "WEIGHTBUS_PORT": "4223",
            "WEIGHTBUS_RECONNECT_FOR_S": "7.5",
            "WEIGHTBUS_PREFIX": "other",
        }
    )
    assert settings == BusSettings(
        url="nats://one:4222,nats://two:4222",
        server_path=Path("/opt/nats-server"),
        data_dir=Path("/data"),
        port=4223,
        reconnect_for_s=7.5,
        prefix="other",
    )


@pytest.mark.parametrize(
    "given",
    [
        {"prefix": "a.b"},
        {"prefix": ""},
        {"url": ""},
        {"url": "http://host"},
        {"url": "nats://host,"},
        {"url": "nats://host:port"},
        {"port": 65_536},
        {"connect_timeout_s": 0},
        {"server_start_timeout_s": 0},
        {"request_timeout_s": float("nan")},
        {"reconnect_for_s": -1},
        {"presence_ttl_s": 0},
        {"max_unread_messages": 0},
        {"credentials_file": Path("a"), "nkey_seed_file": Path("b")},
        {"tls_key_file": Path("a")},
    ],
)
def test_setting_is_refused_by_name_when_it_cannot_be_used(given: dict[str, Any]) -> None:
    with pytest.raises(SettingInvalid) as raised:
        BusSettings(**given)
    assert raised.value.setting in given
    with pytest.raises(SettingInvalid):
        msgspec.structs.replace(BusSettings(), **given)


@pytest.mark.parametrize("value", ["x", "1e999", "70000"])
def test_variable_is_refused_when_its_value_is_no_port(value: str) -> None:
    with pytest.raises(SettingInvalid, match="WEIGHTBUS_PORT"):
        BusSettings.from_env({"WEIGHTBUS_PORT": value})


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({"WEIGHTBUS_NATS_URL": "http://user:secret@host"}, "WEIGHTBUS_NATS_URL"),
        ({"WEIGHTBUS_PORT": "x"}, "WEIGHTBUS_PORT"),
        ({"WEIGHTBUS_PORT": "70000"}, "WEIGHTBUS_PORT"),
        ({"WEIGHTBUS_RECONNECT_FOR_S": "-1"}, "WEIGHTBUS_RECONNECT_FOR_S"),
        ({"WEIGHTBUS_TLS_KEY_FILE": "/key"}, "WEIGHTBUS_TLS_KEY_FILE"),
    ],
)
def test_error_names_one_variable_and_no_password_when_a_value_cannot_be_used(
    environ: dict[str, str], variable: str
) -> None:
    others = {"WEIGHTBUS_NATS_URL": "nats://user:secret@host", "WEIGHTBUS_PREFIX": "other"}
    with pytest.raises(SettingInvalid) as raised:
        BusSettings.from_env({**others, **environ})
    assert raised.value.setting == variable
    assert "secret" not in str(raised.value)
    assert "other" not in str(raised.value)


def test_url_is_not_repeated_when_it_is_refused() -> None:
    with pytest.raises(SettingInvalid) as raised:
        BusSettings(url="http://user:secret@host")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("url", ["host", "host:4222", "tls://h:1", "wss://h", "nats://[::1]:4222"])
def test_url_is_taken_when_nats_knows_it(url: str) -> None:
    assert BusSettings(url=url).url == url
