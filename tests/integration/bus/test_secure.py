"""TLS, credentials and old servers: what passes through to nats-py, and how it is refused."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from anyio.abc import SocketAttribute, SocketStream

from weightbus.bus.connection import open_bus
from weightbus.bus.errors import BusTimeout, BusUnavailable, ServerTooOld
from weightbus.bus.guard import guarded_command
from weightbus.bus.server import find_server
from weightbus.bus.settings import BusSettings
from weightbus.schemas.checkpoint import CheckpointRetired

pytestmark = pytest.mark.anyio

nkeys = pytest.importorskip("nkeys", reason="nats-py[nkeys] is not installed")

MESSAGE = CheckpointRetired(model="m", version=1, producer="trainer")
NO_SECOND_TRY_S = 4.0
"""Less than `connect_timeout_s`: a refusal must not be tried again until that runs out."""


@contextmanager
def configured_server(directory: Path, config: str) -> Iterator[str]:
    """A nats-server with a configuration of its own; gives host:port."""
    path = directory / "nats.conf"
    path.write_text(
        f'listen: "127.0.0.1:-1"\njetstream {{ store_dir: "{directory / "nats"}" }}\n{config}\n'
    )
    command = guarded_command([str(find_server()), "-c", str(path)])
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as guard:
        assert guard.stdin is not None
        assert guard.stderr is not None
        log = ""
        while "Server is ready" not in log and (line := guard.stderr.readline()):
            log += line.decode()
        found = re.search(r"client connections on (\S+)", log)
        assert found, log
        try:
            yield found[1]
        finally:
            guard.stdin.close()
            guard.stderr.read()


def make_certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """(certificate, key), signed by itself, for 127.0.0.1."""
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
            *("ec_paramgen_curve:prime256v1", "-nodes", "-days", "1", "-subj", f"/CN={name}"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-addext", "keyUsage=critical,digitalSignature,keyCertSign"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes them")


async def assert_works(settings: BusSettings) -> None:
    async with open_bus(settings) as bus:
        await bus.publish(MESSAGE)
        last = await bus.last(CheckpointRetired, model="m")
    assert last is not None
    assert last.message == MESSAGE


async def assert_refused(settings: BusSettings, reason: str) -> None:
    with anyio.fail_after(NO_SECOND_TRY_S), pytest.raises(BusUnavailable, match=reason):
        async with open_bus(settings):
            pass


@needs_openssl
async def test_bus_works_over_tls_when_the_authority_is_known(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    config = f'tls {{ cert_file: "{certificate}", key_file: "{key}" }}'
    with configured_server(tmp_path, config) as address:
        await assert_works(BusSettings(url=f"tls://{address}", tls_ca_file=certificate))
        await assert_refused(BusSettings(url=f"tls://{address}"), "certificate verify failed")


@needs_openssl
async def test_bus_works_over_tls_when_the_server_verifies_its_clients(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    mine, my_key = make_certificate(tmp_path, "client")
    config = (
        f'tls {{ cert_file: "{certificate}", key_file: "{key}", ca_file: "{mine}", verify: true }}'
    )
    with configured_server(tmp_path, config) as address:
        known = BusSettings(
            url=f"nats://{address}",
            tls_ca_file=certificate,
            tls_cert_file=mine,
            tls_key_file=my_key,
        )
        await assert_works(known)
        stranger = BusSettings(
            url=f"nats://{address}", tls_ca_file=certificate, connect_timeout_s=1.0
        )
        await assert_refused(stranger, "not available")


async def test_bus_works_when_the_server_knows_the_user(tmp_path: Path) -> None:
    config = 'authorization { user: "trainer", password: "secret" }'
    with configured_server(tmp_path, config) as address:
        await assert_works(BusSettings(url=f"nats://trainer:secret@{address}"))
        await assert_refused(BusSettings(url=f"nats://trainer:guess@{address}"), "Authorization")
        await assert_refused(BusSettings(url=f"nats://{address}"), "Authorization")


async def test_bus_works_when_the_server_knows_the_nkey(tmp_path: Path) -> None:
    known, unknown = new_key(nkeys.PREFIX_BYTE_USER), new_key(nkeys.PREFIX_BYTE_USER)
    config = f"authorization {{ users: [{{ nkey: {public(known)} }}] }}"
    with configured_server(tmp_path, config) as address:
        seed = tmp_path / "seed"
        settings = BusSettings(url=f"nats://{address}", nkey_seed_file=seed)
        seed.write_bytes(bytes(known.seed))
        await assert_works(settings)
        seed.write_bytes(bytes(unknown.seed))
        await assert_refused(settings, "Authorization")


async def test_bus_works_when_the_credentials_file_is_signed(tmp_path: Path) -> None:
    operator, user = new_key(nkeys.PREFIX_BYTE_OPERATOR), new_key(nkeys.PREFIX_BYTE_USER)
    system, account = (new_key(nkeys.PREFIX_BYTE_ACCOUNT) for _ in range(2))
    limits = {"subs": -1, "data": -1, "payload": -1, "conn": -1, "leaf": -1, "wildcards": True}
    storage = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
    config = f"""
        operator: {jwt(operator, operator, "operator", {})}
        system_account: {public(system)}
        resolver: MEMORY
        resolver_preload: {{
            {public(system)}: {jwt(system, operator, "account", {"limits": limits})}
            {public(account)}: {jwt(account, operator, "account", {"limits": limits | storage})}
        }}
    """
    credentials = tmp_path / "user.creds"
    user_limits = {"subs": -1, "data": -1, "payload": -1}
    credentials.write_text(
        f"-----BEGIN NATS USER JWT-----\n{jwt(user, account, 'user', user_limits)}\n"
        "------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{bytes(user.seed).decode()}\n"
        "------END USER NKEY SEED------\n"
    )
    with configured_server(tmp_path, config) as address:
        settings = BusSettings(url=f"nats://{address}", credentials_file=credentials)
        await assert_works(settings)


def new_key(prefix: int) -> Any:
    return nkeys.from_seed(bytearray(nkeys.encode_seed(os.urandom(32), prefix)))


def public(key: Any) -> str:
    return bytes(key.public_key).decode()


def jwt(subject: Any, issuer: Any, kind: str, claims: Mapping[str, object]) -> str:
    """A NATS JWT: https://docs.nats.io/running-a-nats-service/configuration/securing_nats/jwt."""

    def part(value: object) -> str:
        return base64.urlsafe_b64encode(msgspec.json.encode(value)).decode().rstrip("=")

    body = {
        "iat": 1,
        "iss": public(issuer),
        "sub": public(subject),
        "name": kind,
        "nats": {**claims, "type": kind, "version": 2},
    }
    body["jti"] = base64.b32encode(hashlib.sha256(msgspec.json.encode(body)).digest()).decode()
    signed = f"{part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{part(body)}"
    signature = base64.urlsafe_b64encode(issuer.sign(signed.encode())).decode().rstrip("=")
    return f"{signed}.{signature}"


async def test_bus_says_so_when_it_may_not_publish(tmp_path: Path) -> None:
    config = (
        'authorization { users: [{ user: "monitor", password: "x", '
        'permissions: { publish: ["$JS.API.>"], subscribe: ">" } }] }'
    )
    with configured_server(tmp_path, config) as address:
        settings = BusSettings(url=f"nats://monitor:x@{address}", request_timeout_s=0.5)
        async with open_bus(settings) as bus:
            with pytest.raises(BusTimeout, match="permissions violation for publish"):
                await bus.publish(MESSAGE)


async def test_bus_says_so_when_the_server_has_no_jetstream(tmp_path: Path) -> None:
    config = "jetstream: disabled"
    with configured_server(tmp_path, config) as address:
        settings = BusSettings(url=f"nats://{address}", request_timeout_s=0.5)
        await assert_refused(settings, "JetStream")


@asynccontextmanager
async def old_server() -> AsyncIterator[str]:
    """Speaks enough of the protocol to be connected to."""

    async def serve(client: SocketStream) -> None:
        async with client:
            info = {"server_id": "x", "version": "2.10.29", "max_payload": 1, "headers": True}
            await client.send(b"INFO " + msgspec.json.encode(info) + b"\r\n")
            async for data in client:
                if b"PING" in data:
                    await client.send(b"PONG\r\n")

    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(listener.serve, serve)
        yield f"nats://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        tasks.cancel_scope.cancel()


async def test_bus_is_refused_when_the_server_is_too_old() -> None:
    async with old_server() as url:
        with pytest.raises(ServerTooOld, match=r"2\.10\.29: 2\.11 or later"):
            async with open_bus(BusSettings(url=url)):
                pass
