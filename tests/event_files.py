"""Reads back what was written for TensorBoard, without TensorBoard."""

import struct
from pathlib import Path

from tensorboardX.proto import event_pb2


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Name of a curve -> its (step, value) in the order in which they stand, over all event files in `folder`."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):  # length, its checksum, the event, its checksum
            (size,) = struct.unpack_from("<Q", content, at)
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
            at += 12 + size + 4
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found
