"""Another process with memory on a GPU, for test_gather: `python -m tests.gpu.holder DEVICE SIZE`.

Fills it with what comes on stdin, answers with its handle, and holds it until stdin ends.
"""

from __future__ import annotations

import sys

from weightbus.bus.cuda import open_cuda

if __name__ == "__main__":
    device, size_bytes = int(sys.argv[1]), int(sys.argv[2])
    cuda = open_cuda()
    address = cuda.allocate(device, size_bytes)
    cuda.write(device, address, sys.stdin.buffer.read(size_bytes))
    print(cuda.export(address).hex(), flush=True)
    sys.stdin.buffer.read()
