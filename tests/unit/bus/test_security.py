"""Files with credentials and certificates are refused by name before anything is connected."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from weightbus.bus.errors import SettingInvalid
from weightbus.bus.security import connect_arguments
from weightbus.bus.settings import BusSettings

pytest.importorskip("nkeys", reason="nats-py[nkeys] is not installed")


def test_no_arguments_are_made_when_no_file_is_named() -> None:
    assert connect_arguments(BusSettings()) == {}


@pytest.mark.parametrize(
    "setting", ["credentials_file", "nkey_seed_file", "tls_ca_file", "tls_cert_file"]
)
def test_file_is_refused_when_it_is_absent_or_junk(tmp_path: Path, setting: str) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"\xffjunk")
    for path in (tmp_path / "absent", junk):
        with pytest.raises(SettingInvalid) as raised:
            connect_arguments(msgspec.structs.replace(BusSettings(), **{setting: path}))
        assert raised.value.setting == setting
        assert str(path) in str(raised.value)


def test_credentials_are_refused_when_the_seed_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "user.creds"
    path.write_text("-----BEGIN NATS USER JWT-----\nx\n------END NATS USER JWT------\n")
    with pytest.raises(SettingInvalid, match="has no BEGIN USER NKEY SEED"):
        connect_arguments(BusSettings(credentials_file=path))
