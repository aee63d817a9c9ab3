"""A NATS server that stores one message, then throws its client out, and lets nobody in again."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import BinaryIO

__all__ = ("rude_server",)

INFO = b'INFO {"server_id":"rude","version":"2.10.0","proto":1,"headers":true,'
INFO += b'"max_payload":1048576}\r\n'
STORED = b'{"stream":"weightbus-CHECKPOINTS","seq":1}'
OUT = b"-ERR 'Authorization Violation'\r\n"


@contextmanager
def rude_server() -> Iterator[str]:
    """Its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = Thread(target=_serve, args=(listening,))
        serving.start()
        try:
            yield f"nats://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            serving.join()


def _serve(listening: socket.socket) -> None:
    is_first = True
    while True:
        try:
            client, _ = listening.accept()
        except OSError:  # the end
            return
        with client, client.makefile("rb") as lines:
            client.sendall(INFO)
            if is_first:
                _store(client, lines)
            else:
                lines.readline()
            client.sendall(OUT)
        is_first = False


def _store(client: socket.socket, lines: BinaryIO) -> None:
    """Speak with a client until it has published one message."""
    inboxes: dict[bytes, bytes] = {}
    for line in lines:
        match line.split():
            case [b"PING"]:
                client.sendall(b"PONG\r\n")
            case [b"SUB", subject, number]:
                inboxes[subject.rstrip(b"*")] = number
            case [b"HPUB" | b"PUB", _, reply, *sizes]:
                lines.read(int(sizes[-1]))
                (number,) = (inboxes[each] for each in inboxes if reply.startswith(each))
                sent = b"%b %b %d\r\n%b\r\n" % (reply, number, len(STORED), STORED)
                client.sendall(b"MSG " + sent)
                return
