"""Another process of the host, which reads slots on GPUs by their handles. Knows no torch.

Every line on stdin is a JSON object: `handle` (hexadecimal), `device` (number of the GPU that
reads), `size_bytes` of data. It answers with one: `generation`, and `sha256` of the data; or
`error`. Handles are opened for one answer.
"""

from __future__ import annotations

import hashlib
import json
import sys

from weightbus.bus.cuda import open_cuda
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES, unpack_shm_header

PIECE_BYTES = 2**24


def read(handle: bytes, device: int, size_bytes: int) -> dict[str, object]:
    cuda = open_cuda()
    address = cuda.open_handle(device, handle)
    try:
        _, generation = unpack_shm_header(cuda.read(device, address, 64))
        found = hashlib.sha256()
        for begin in range(0, size_bytes, PIECE_BYTES):
            count = min(PIECE_BYTES, size_bytes - begin)
            found.update(cuda.read(device, address + SHM_HEADER_BYTES + begin, count))
    finally:
        cuda.close_handle(device, address)
    return {"generation": generation, "sha256": found.hexdigest()}


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = read(bytes.fromhex(asked["handle"]), asked["device"], asked["size_bytes"])
        except WeightBusError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
