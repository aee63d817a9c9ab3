"""One worker of a host, with a GPU of its own: `python -m tests.gpu.lane_worker DEVICE`.

Every line on stdin is a JSON object: `do` (`prepare`, `run` or `close`), and for the first two
`feed` and `layout` (MessagePack, hexadecimal), `deadline_s`, and `die_at`: the bucket before which
the process ends. Every line of its answers is one: `parts` (SHA-256 of the runs of each),
`seconds` and `bytes` that it copied, or `error` and `reason`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from typing import Any

import msgspec

from tests.unit.transfer.device_fleet import HOST_ID
from weightbus.bus.cuda import open_cuda
from weightbus.consumers.planning.buckets import plan_buckets
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.transfer.device_lanes import DeviceFeed, DeviceLanes, DeviceStaging
from weightbus.consumers.transfer.lanes import StagingCache, leave_lanes
from weightbus.consumers.transfer.segments import SegmentCache
from weightbus.schemas.layout import Layout
from weightbus.schemas.layout_codec import decode_layout
from weightbus.schemas.worker import Stream

PIECE_BYTES = 2**22


class LaneWorker:
    """What a `ReloadWorker` has for device lanes."""

    def __init__(self, number: int) -> None:
        self._number, device = number, f"cuda:{number}"
        self._cuda = open_cuda()
        self._staging = StagingCache(device)
        self._segments = SegmentCache(HOST_ID, (), device)
        self._device = DeviceStaging(device)

    def prepare(self, feed: Stream, layout: Layout, budget: Deadline) -> dict[str, object]:
        with self._staging.open_all(feed.lanes, 0, feed.turn, budget, is_read=False) as blocks:
            self._device.prepare(self._fed(feed, layout, blocks), budget)
        return {}

    def run(self, feed: Stream, layout: Layout, budget: Deadline, die_at: int) -> dict[str, object]:
        since = time.monotonic()
        with self._staging.open_all(feed.lanes, 0, feed.turn, budget, is_read=False) as blocks:
            try:
                fed = self._fed(feed, layout, blocks)
                with self._device.open_lanes(fed, budget) as lanes:
                    parts = self._read(fed, lanes, die_at)
                    copied = sum(timing.bytes for timing in lanes.timings)
            except BaseException:
                leave_lanes(blocks, feed)
                raise
        return {"parts": parts, "seconds": time.monotonic() - since, "bytes": copied}

    def close(self) -> None:
        self._device.close()
        self._staging.close()
        self._segments.close()

    def _fed(self, feed: Stream, layout: Layout, blocks: Any) -> DeviceFeed:
        plan = plan_buckets(layout, feed.bucket_bytes, len(feed.lanes))
        sizes = tuple(segment.size_bytes for segment in layout.segments)
        return DeviceFeed(feed, blocks, plan, sizes, self._staging, self._segments)

    def _read(self, fed: DeviceFeed, lanes: DeviceLanes, die_at: int) -> list[str]:
        parts, buffer = [], bytearray(PIECE_BYTES)
        for bucket in range(fed.plan.buckets):
            lanes.wait_filled(bucket)
            if bucket == die_at:
                os._exit(3)
            for lane in range(fed.plan.lanes):
                found = hashlib.sha256()
                for run in fed.plan.runs_of(bucket * fed.plan.lanes + lane):
                    address = lanes.address(bucket, lane) + int(run["staged"])
                    size_bytes = int(run["size_bytes"])
                    for begin in range(0, size_bytes, PIECE_BYTES):
                        piece = memoryview(buffer)[: min(PIECE_BYTES, size_bytes - begin)]
                        self._cuda.read_into(self._number, address + begin, piece)
                        found.update(piece)
                parts.append(found.hexdigest())
            lanes.done(bucket)
        return parts


def main() -> None:
    worker = LaneWorker(int(sys.argv[1]))
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "close":
            worker.close()
            print(json.dumps({}), flush=True)
            return
        feed = msgspec.msgpack.decode(bytes.fromhex(asked["feed"]), type=Stream)
        layout = decode_layout(bytes.fromhex(asked["layout"]))
        budget = Deadline("reload", asked["deadline_s"])
        try:
            if asked["do"] == "prepare":
                answer = worker.prepare(feed, layout, budget)
            else:
                answer = worker.run(feed, layout, budget, asked["die_at"])
        except Exception as error:  # noqa: BLE001 - the test looks at it
            answer = {"error": type(error).__name__, "reason": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
