"""Layout of checkpoints in the store: tensors split along dim 0, and a manifest written last.

    <run>/checkpoints/step-00000400/<tensor>-<first row>.safetensors
    <run>/checkpoints/step-00000400/manifest.json

A checkpoint exists as soon as its manifest does. Every rank writes the rows that it holds and reads
the rows that it needs, so the number of ranks may change between save and load.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dist_sae.checkpoint import legacy
from dist_sae.errors import CorruptObjectError, StoreError
from dist_sae.storage import ObjectStore
from dist_sae.storage.keys import KeyPattern
from dist_sae.storage.local import LocalStore
from dist_sae.storage.records import READS, Record, digest, read_record, seal

logger = logging.getLogger(__name__)

PART_BYTES = 64 * 2**20
"""Maximum size of a part, and so of what a rank reads in vain if its rows start within a part."""
_COPIES = 8  # parts that are copied concurrently
_MANIFEST = "manifest.json"


def part_rows(row_bytes: int) -> int:
    """Return the number of rows per part.

    It is a power of 2, so that few chunks of latents span two parts (`StoredEncoder`).
    """
    fitting = max(1, PART_BYTES // max(1, row_bytes))
    return 1 << fitting.bit_length() - 1


class Part(Record):
    """Rows `[start, stop)` of a tensor."""

    key: str
    start: int
    stop: int
    bytes: int
    sha256: str


class TensorRecord(Record):
    """A tensor's shape and the parts that contain its rows."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    older: bool = False
    """True if the name is an older version's and must be converted (`checkpoint/legacy.py`)."""


class CheckpointManifest(Record):
    """`manifest.json` of a checkpoint."""

    schema_version: Literal[1] = 1
    step: int
    scalars: dict[str, Any]
    tensors: dict[str, TensorRecord]


class Piece(NamedTuple):
    """Rows `[first, first + len(rows))` of a tensor that has `total` rows."""

    name: str
    rows: Tensor
    first: int
    total: int


class Checkpoint(NamedTuple):
    """A run's complete state after a step, in the store."""

    store: ObjectStore
    manifest: CheckpointManifest

    @property
    def step(self) -> int:
        """Number of training steps done."""
        return self.manifest.step

    @property
    def scalars(self) -> dict[str, Any]:
        """The state other than tensors."""
        return self.manifest.scalars

    @property
    def digest(self) -> str:
        """Checksum that identifies the checkpoint's content."""
        return digest(self.manifest)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, read in full."""
        return {name: self.read(name) for name in self.manifest.tensors}

    def has(self, name: str) -> bool:
        """Return whether the checkpoint contains the tensor."""
        return name in self.manifest.tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows `[start, stop)` of a tensor. Only their parts are fetched and checked.

        Raises:
            CorruptObjectError: A part does not match its checksum.
        """
        record = self.manifest.tensors[name]
        if not record.shape:
            return self.rows(record.parts[0])[0]
        stop = record.shape[0] if stop is None else stop
        pieces = (rows for _, rows in self.pieces(name, start, stop))
        return torch.cat(list(pieces)).reshape(-1, *record.shape[1:])

    def fill(self, tensor: Tensor, name: str, start: int = 0) -> None:
        """Fill a tensor with stored rows from `start` on, with one part in memory at a time.

        Raises:
            CorruptObjectError: A part does not match its checksum, or rows are missing.
        """
        if not self.manifest.tensors[name].shape:
            tensor.copy_(self.read(name))
            return
        for first, rows in self.pieces(name, start, start + len(tensor)):
            tensor[first - start : first - start + len(rows)] = rows.to(tensor.device)

    def pieces(
        self, name: str, start: int, stop: int, read: Callable[[Part], Tensor] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield rows `[start, stop)` part by part, each as (first row number, rows).

        Args:
            name: Name of the tensor.
            start: First row.
            stop: Row after the last.
            read: Function that returns the rows of a part. By default the part is fetched.

        Raises:
            CorruptObjectError: A part does not match its checksum, or rows are missing.
        """
        record = self.manifest.tensors[name]
        at = start
        for part in record.parts:
            if part.start <= at < min(part.stop, stop):
                rows = (read or self.rows)(part)[at - part.start : stop - part.start]
                rows = rows.reshape(-1, *record.shape[1:])
                yield at, self._modern(name, at, rows) if record.older else rows
                at += len(rows)
        if at < stop:
            raise self._lacks_rows(name, at)

    def _modern(self, name: str, first: int, rows: Tensor) -> Tensor:
        widths = (r.shape[0] for n, r in self.manifest.tensors.items() if n.endswith("b_dec"))
        stop = first + len(rows)
        return legacy.converted(name, rows, next(widths), lambda: self.read("theta", first, stop))

    def check(self, name: str) -> None:
        """Verify that a tensor's parts match their checksums and cover all rows.

        Raises:
            CorruptObjectError: A part is damaged, or rows are missing.
        """
        record = self.manifest.tensors[name]
        at = 0
        for part in record.parts:
            rows = len(self.rows(part))
            if (part.start, part.stop) != (at, at + rows):
                break
            at = part.stop
        if at != (record.shape or (1,))[0]:
            raise self._lacks_rows(name, at)

    def _lacks_rows(self, name: str, at: int) -> CorruptObjectError:
        return CorruptObjectError(
            f"step {self.step}: {name} is missing rows from {at} on", url=self.store.url
        )

    def rows(self, part: Part) -> Tensor:
        """Fetch the rows of a part. Raises the same errors as `data`."""
        return safetensors.torch.load(self.data(part))["rows"]

    def mapped(self, part: Part) -> Tensor | None:
        """Memory-map the rows of a part. None if the store is not a local folder.

        The rows remain readable if the file is deleted. The exception is NFS: if another machine
        deletes the file, reading the rows kills the process (SIGBUS). Raises the same errors as
        `data`.
        """
        if not isinstance(self.store, LocalStore):
            return None
        with self.store.file(part.key) as path:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != part.sha256:
                    raise self._damaged(part)
            with safetensors.safe_open(path, "pt") as stored:
                rows: Tensor = stored.get_tensor("rows")
                return rows

    def data(self, part: Part) -> bytes:
        """Fetch the bytes of a part's object.

        Raises:
            CorruptObjectError: The bytes do not match the checksum.
        """
        for _ in range(READS):
            data = self.store.get(part.key)
            if hashlib.sha256(data).hexdigest() == part.sha256:
                return data
        raise self._damaged(part)

    def _damaged(self, part: Part) -> CorruptObjectError:
        return CorruptObjectError(
            "does not match its checksum; delete its folder to use the previous checkpoint",
            url=self.store.url,
            key=part.key,
        )


class Checkpoints:
    """The checkpoints of one run.

    Args:
        store: The store of runs.
        run: Name of the run.
        keep: Number of newest checkpoints to keep.
        every: Also keep checkpoints at multiples of this number of steps.
        best: Also keep this number of checkpoints, those with the lowest `heldout_fvu`.
        folder: Name of the checkpoints' folder in the run's folder.
    """

    def __init__(
        self,
        store: ObjectStore,
        run: str,
        keep: int,
        *,
        every: int | None = None,
        best: int = 0,
        folder: str = "checkpoints",
    ) -> None:
        self._store = store
        self._prefix = f"{run}/{folder}/"
        self._keys = KeyPattern(
            self._prefix, r"step-(?P<step>\d{8})/(manifest\.json|[\w.]+-\d{9}\.safetensors)"
        )
        self._keep = keep
        self._every = every
        self._best = best

    def steps(self) -> list[int]:
        """List the steps of complete checkpoints, ascending."""
        return list(self.ages())

    def ages(self) -> dict[int, float]:
        """Return the age of each complete checkpoint in seconds by the store's clock.

        The result is keyed by step, ascending.
        """
        return {
            int(key["step"]): entry.age_seconds
            for key, entry in self._keys.entries(self._store)
            if key[0].endswith(f"/{_MANIFEST}")
        }

    def folders(self) -> set[int]:
        """Return the steps of complete and incomplete checkpoints."""
        return {int(key["step"]) for key in self._keys.keys(self._store)}

    def is_source_of(self, exc: StoreError) -> bool:
        """Return whether an error is about an object of these checkpoints."""
        key = self._prefix if exc.key is None else exc.key
        return exc.url == self._store.url and key.startswith(self._prefix)

    def write(self, step: int, pieces: Iterable[Piece]) -> dict[str, TensorRecord]:
        """Store one rank's pieces and return their records.

        The checkpoint is complete after `commit` with the records of all ranks.
        """
        records: dict[str, TensorRecord] = {}
        for name, tensor, first, total in pieces:
            rows = tensor.reshape(tensor.shape or (1,)).detach()
            per_part = part_rows(rows[:1].nbytes)
            parts = []
            for start in range(0, len(rows), per_part):
                piece = rows[start : start + per_part].contiguous().cpu()
                data = safetensors.torch.save({"rows": piece})
                key = self._part_key(step, name, first + start)
                self._store.put(key, data)
                parts.append(
                    Part(
                        key=key,
                        start=first + start,
                        stop=first + start + len(piece),
                        bytes=len(data),
                        sha256=hashlib.sha256(data).hexdigest(),
                    )
                )
            shape = (total, *tensor.shape[1:]) if tensor.shape else ()
            records[name] = TensorRecord(shape=shape, parts=tuple(parts))
        return records

    def copy(self, checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, TensorRecord]:
        """Copy tensors from another run's checkpoint. Returns records as `write` does.

        Raises:
            CorruptObjectError: A part is damaged.
        """

        def copied(name: str, part: Part) -> Part:
            key = self._part_key(checkpoint.step, name, part.start)
            self._store.put(key, checkpoint.data(part))
            return part.model_copy(update={"key": key})

        records = {}
        with ThreadPoolExecutor(_COPIES) as pool:
            for name in names:
                record = checkpoint.manifest.tensors[name]
                parts = tuple(pool.map(partial(copied, name), record.parts))
                records[name] = record.model_copy(update={"parts": parts})
        return records

    def commit(
        self, step: int, records: Iterable[Mapping[str, TensorRecord]], scalars: Mapping[str, Any]
    ) -> int:
        """Write the manifest, delete old checkpoints, and return the checkpoint's bytes.

        `records` are those of all ranks.
        """
        merged: dict[str, TensorRecord] = {}
        for name, record in (item for rank in records for item in rank.items()):
            before = merged[name].parts if name in merged else ()
            parts = tuple(sorted((*before, *record.parts), key=lambda part: part.start))
            merged[name] = record.model_copy(update={"parts": parts})
        manifest = CheckpointManifest(step=step, scalars=dict(scalars), tensors=merged)
        self._store.put(f"{self._folder(step)}{_MANIFEST}", seal(manifest))
        kept = self._kept()
        for old in self.folders():
            if old < step and old not in kept:  # too old, or from an interrupted save
                self.delete(old)
        return sum(part.bytes for record in merged.values() for part in record.parts)

    def _kept(self) -> set[int]:
        steps = self.steps()
        kept = set(steps[-self._keep :])
        if self._every:
            kept.update(step for step in steps if step % self._every == 0)
        if self._best:
            measured = [(c.scalars.get("heldout_fvu"), c.step) for c in self.newest_first()]
            ranked = sorted((fvu, step) for fvu, step in measured if fvu is not None)
            kept.update(step for _, step in ranked[: self._best])
        return kept

    def open(self, step: int) -> Checkpoint:
        """Open a complete checkpoint.

        Raises:
            CorruptObjectError: The manifest is damaged, or is a copy from another step.
        """
        key = f"{self._folder(step)}{_MANIFEST}"
        manifest = read_record(CheckpointManifest, self._store, key)
        if manifest.step != step:
            raise CorruptObjectError(
                f"is a copy of step {manifest.step}; rename its folder to something other than "
                f"step-N",
                url=self._store.url,
                key=key,
            )
        tensors = legacy.renamed(
            manifest.tensors, lambda record: record.model_copy(update={"older": True})
        )
        return Checkpoint(self._store, manifest.model_copy(update={"tensors": tensors}))

    def latest(self) -> Checkpoint | None:
        """Open the newest checkpoint with a readable manifest. None if there is none."""
        return next(self.newest_first(), None)

    def newest_first(self) -> Iterator[Checkpoint]:
        """Open checkpoints from newest to oldest. Damaged manifests are logged and skipped."""
        for step in reversed(self.steps()):
            try:
                yield self.open(step)
            except CorruptObjectError as exc:
                logger.error("%s; using the previous checkpoint", exc)

    def delete(self, step: int) -> None:
        """Delete a checkpoint. Its manifest goes first, so that no half-deleted one is opened."""
        folder = self._folder(step)
        self._store.delete(f"{folder}{_MANIFEST}")
        self._store.delete_many(
            [key[0] for key in self._keys.keys(self._store, f"step-{step:08d}/")]
        )

    def _folder(self, step: int) -> str:
        return f"{self._prefix}step-{step:08d}/"

    def _part_key(self, step: int, name: str, first: int) -> str:
        return f"{self._folder(step)}{name}-{first:09d}.safetensors"
