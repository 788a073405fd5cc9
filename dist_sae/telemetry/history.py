"""The run's history: its metrics in the store of runs, so that a report needs no Prometheus."""

import json
from collections.abc import Mapping
from typing import Any

from dist_sae.storage import ObjectStore
from dist_sae.storage.keys import KeyPattern


class History:
    """Records since one start of a run, as JSON lines in `history/<first step>.jsonl`."""

    def __init__(self, store: ObjectStore, run: str, first_step: int) -> None:
        self._store = store
        self._files = _files(run)
        self._key = f"{self._files.folder}{first_step:08d}.jsonl"
        self._lines: list[str] = []

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record, which must have a `step`."""
        self._lines.append(json.dumps(record))

    def flush(self) -> None:
        """Make all records so far durable, and delete files that start at a later step.

        Those files continued a later checkpoint, which has been abandoned since.
        """
        for key in list(self._files.keys(self._store)):
            if key[0] > self._key:
                self._store.delete(key[0])
        if self._lines:
            self._store.put(self._key, ("\n".join(self._lines) + "\n").encode())

    def close(self) -> None:
        """Do nothing: training from the last checkpoint on produces unflushed records again."""


def read_history(store: ObjectStore, run: str) -> list[dict[str, Any]]:
    """Read a run's records, one per step. For a repeated step, the later one counts."""
    records: dict[int, dict[str, Any]] = {}
    for key in _files(run).keys(store):
        first = int(key["first"])
        records = {step: record for step, record in records.items() if step <= first}
        for line in store.get(key[0]).decode().splitlines():
            record = json.loads(line)
            records[record["step"]] = records.get(record["step"], {}) | record
    return [records[step] for step in sorted(records)]


def _files(run: str) -> KeyPattern:
    return KeyPattern(f"{run}/history/", r"(?P<first>\d{8})\.jsonl")
