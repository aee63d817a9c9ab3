"""Sends bytes from one host to another, for tests of the network itself. Runs as a script, too.

`python traffic.py receive ADDRESS PORT` says `ready`, and for every line of stdin how many bytes
have come until then; `python traffic.py send ADDRESS PORT BYTES` says `sent` at its end.
"""

from __future__ import annotations

import socket
import sys
import threading

__all__ = ("PORT",)

PORT = 47_000
CHUNK_BYTES = 1 << 16
CONNECT_S = 60.0


class Receiver:
    """Counts what comes by one connection after the other."""

    def __init__(self, address: str, port: int) -> None:
        self.received_bytes = 0
        self._listener = socket.create_server((address, port))

    def run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                while chunk := connection.recv(CHUNK_BYTES):
                    self.received_bytes += len(chunk)


def receive(address: str, port: int) -> None:
    receiver = Receiver(address, port)
    threading.Thread(target=receiver.run, daemon=True).start()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(receiver.received_bytes, flush=True)


def send(address: str, port: int, size_bytes: int) -> None:
    with socket.create_connection((address, port), CONNECT_S) as connection:
        connection.settimeout(None)
        connection.sendall(bytes(size_bytes))
    print("sent", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(sys.argv[2], int(sys.argv[3]))
    else:
        send(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
