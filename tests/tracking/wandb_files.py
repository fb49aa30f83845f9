"""Reads W&B's offline run files: LevelDB log blocks of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
FIRST, MIDDLE = 2, 3


def records(path: Path) -> Iterator[Any]:
    """The records of a `run-ID.wandb` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # too short for a header: padding
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (FIRST, MIDDLE):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_run(path: Path) -> dict[str, Any]:
    """What a test asks of a run file: its identity, config, axes (metric → step metric), history rows, summary, artifacts, exit code."""
    run: dict[str, Any] = {"axes": {}, "rows": [], "summary": {}, "artifacts": [], "exit_code": None}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            about = record.run
            run |= {"id": about.run_id, "group": about.run_group, "job_type": about.job_type, "tags": list(about.tags)}
            run["config"] = {item.key: json.loads(item.value_json) for item in about.config.update}
        elif kind == "metric" and record.metric.step_metric:
            run["axes"][record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "history":
            run["rows"].append(_items(record.history.item))
        elif kind == "summary":
            run["summary"] |= _items(record.summary.update)
        elif kind == "artifact":
            run["artifacts"].append((record.artifact.type, sorted(entry.path for entry in record.artifact.manifest.contents)))
        elif kind == "exit":
            run["exit_code"] = record.exit.exit_code
    return run


def _items(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
