"""The same numbers in the run's folder, so that a report needs no Prometheus."""

import json
from collections.abc import Mapping
from typing import Any

from dist_sae.storage import ObjectStore
from dist_sae.storage.own import OwnKeys


class History:
    """Records of one process's life, as JSON lines under `history/<first step>.jsonl`."""

    def __init__(self, store: ObjectStore, run: str, first_step: int) -> None:
        self._store = store
        self._lives = _lives(run)
        self._key = f"{self._lives.folder}{first_step:08d}.jsonl"
        self._lines: list[str] = []

    def append(self, record: Mapping[str, Any]) -> None:
        """Keep a record; it must have a `step`."""
        self._lines.append(json.dumps(record))

    def flush(self) -> None:
        """Make all records so far durable, and forget lives that began at a later step.

        Such a life went on from a checkpoint that has been given up since.
        """
        for key in list(self._lives.keys(self._store)):
            if key[0] > self._key:
                self._store.delete(key[0])
        if self._lines:
            self._store.put(self._key, ("\n".join(self._lines) + "\n").encode())

    def close(self) -> None:
        """Nothing: what was not made durable is behind the last checkpoint, and comes again."""


def read_history(store: ObjectStore, run: str) -> list[dict[str, Any]]:
    """What is known of a run by step; of steps repeated after a restart what came later."""
    records: dict[int, dict[str, Any]] = {}
    for key in _lives(run).keys(store):
        first = int(key["first"])
        records = {step: record for step, record in records.items() if step <= first}
        for line in store.get(key[0]).decode().splitlines():
            record = json.loads(line)
            records[record["step"]] = records.get(record["step"], {}) | record
    return [records[step] for step in sorted(records)]


def _lives(run: str) -> OwnKeys:
    return OwnKeys(f"{run}/history/", r"(?P<first>\d{8})\.jsonl")
