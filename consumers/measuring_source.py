"""The process that `measure_p2p` reads from: offers a block until its standard input ends.

python -m weightbus.consumers.measuring_source ADDRESS PROTOCOL DEVICE SIZE_BYTES
"""

from __future__ import annotations

import sys

from weightbus.bus.endpoint import open_endpoint, register_block, unregister_block
from weightbus.consumers.measuring import open_block


def main() -> None:
    """Say `session address` in one line, and wait."""
    address, protocol, device, size_bytes = sys.argv[1:]
    with (
        open_endpoint(address, protocol, device) as endpoint,
        open_block("source", int(size_bytes)) as block,
    ):
        register_block(endpoint, block)
        sys.stdout.write(f"{endpoint.session} {block.address}\n")
        sys.stdout.flush()
        sys.stdin.read()
        unregister_block(endpoint, block)


if __name__ == "__main__":
    main()
