"""What an offline run of wandb has left in its file."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768  # the file is a log in LevelDB's format, after a header of seven bytes


@dataclass
class Offline:
    """One run."""

    run: Any = None  # its record: run_id, run_group, display_name, tags, job_type
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    ended: bool = False


def read(path: Path) -> Offline:
    """Once wandb's process has written the end of it, which it does soon after `finish`."""
    until = time.monotonic() + 20
    while not (found := _read(path)).ended and time.monotonic() < until:
        time.sleep(0.05)
    return found


def _read(path: Path) -> Offline:
    found = Offline()
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run, found.config = record.run, _items(record.run.config.update)
        elif kind == "history":
            found.points.append(_items(record.history.item))
        elif kind == "summary":
            found.summary |= _items(record.summary.update)
        elif kind == "metric":
            metric = record.metric
            found.metrics[metric.glob_name or metric.name] = metric
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "exit":
            found.ended = True
    return found


def _items(entries: Any) -> dict[str, Any]:
    return {
        entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries
    }


def _records(path: Path) -> Iterator[Any]:
    data = path.read_bytes()
    position, pending = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        if position + 7 + length > len(data):
            return
        pending += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            pending = b""
            yield record
