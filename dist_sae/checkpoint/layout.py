"""Checkpoints in the store: tensors in parts by rows of dim 0, the manifest last.

    <run>/checkpoints/step-00000400/<tensor>-<first row>.safetensors
    <run>/checkpoints/step-00000400/manifest.json

A checkpoint exists when its manifest exists. Parts are independent of the number of ranks; every
rank loads whole tensors so far.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from dist_sae.errors import CorruptObjectError
from dist_sae.storage import ObjectStore

logger = logging.getLogger(__name__)

_PART_BYTES = 256 * 2**20
_MANIFEST = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Record):
    """Rows `[start, stop)` of a tensor."""

    key: str
    start: int
    stop: int
    bytes: int
    sha256: str


class TensorRecord(_Record):
    """A tensor and where its rows are."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


class CheckpointManifest(_Record):
    """`manifest.json` of a checkpoint."""

    schema_version: Literal[1] = 1
    step: int
    scalars: dict[str, Any]
    tensors: dict[str, TensorRecord]


class Checkpoint(NamedTuple):
    """All that a run is at a step."""

    step: int
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        store: The store of runs.
        run: Name of the run.
        keep: How many of the newest to keep.
    """

    def __init__(self, store: ObjectStore, run: str, keep: int) -> None:
        self._store = store
        self._prefix = f"{run}/checkpoints/"
        self._keep = keep

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        keys = self._store.keys(self._prefix)
        return [
            int(k.removeprefix(self._prefix)[5:13]) for k in keys if k.endswith(f"/{_MANIFEST}")
        ]

    def _folders(self) -> set[int]:
        """Steps of which there is anything, a complete checkpoint or not."""
        keys = self._store.keys(self._prefix)
        return {int(key.removeprefix(self._prefix)[5:13]) for key in keys}

    def save(self, step: int, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> int:
        """Store a checkpoint and drop old ones; returns its bytes."""
        if step in self.steps():
            return 0
        records = {name: self._save_tensor(step, name, tensor) for name, tensor in tensors.items()}
        manifest = CheckpointManifest(step=step, scalars=dict(scalars), tensors=records)
        self._store.put(f"{self._folder(step)}{_MANIFEST}", manifest.model_dump_json().encode())
        kept = self.steps()[-self._keep :]
        for old in self._folders():
            if old < step and old not in kept:  # too old, or left by a save that was cut off
                self._delete(old)
        return sum(part.bytes for record in records.values() for part in record.parts)

    def load(self, step: int, names: Collection[str] | None = None) -> Checkpoint:
        """Read and check a checkpoint, or of its tensors `names` alone.

        Raises:
            CorruptObjectError: A part is not what was written.
        """
        key = f"{self._folder(step)}{_MANIFEST}"
        try:
            manifest = CheckpointManifest.model_validate(json.loads(self._store.get(key)))
        except (ValueError, ValidationError) as exc:
            raise CorruptObjectError(
                f"is damaged: {str(exc).splitlines()[0]}; "
                f"delete the folder to fall back to the checkpoint before",
                url=self._store.url,
                key=key,
            ) from exc
        wanted = manifest.tensors if names is None else names
        tensors = {name: self._load_tensor(manifest.tensors[name]) for name in wanted}
        return Checkpoint(manifest.step, tensors, manifest.scalars)

    def latest(self, names: Collection[str] | None = None) -> Checkpoint | None:
        """The newest checkpoint, if there is one."""
        steps = self.steps()
        return self.load(steps[-1], names) if steps else None

    def _save_tensor(self, step: int, name: str, tensor: Tensor) -> TensorRecord:
        rows = tensor.reshape(tensor.shape or (1,)).detach().cpu()
        per_part = max(1, _PART_BYTES // max(1, rows[:1].nbytes))
        parts = []
        for start in range(0, len(rows), per_part):
            piece = rows[start : start + per_part].contiguous()
            data = safetensors.torch.save({"rows": piece})
            key = f"{self._folder(step)}{name}-{start:09d}.safetensors"
            self._store.put(key, data)
            digest = hashlib.sha256(data).hexdigest()
            stop = start + len(piece)
            parts.append(Part(key=key, start=start, stop=stop, bytes=len(data), sha256=digest))
        return TensorRecord(shape=tuple(tensor.shape), parts=tuple(parts))

    def _load_tensor(self, record: TensorRecord) -> Tensor:
        pieces = []
        for part in record.parts:
            data = self._store.get(part.key)
            if hashlib.sha256(data).hexdigest() != part.sha256:
                raise CorruptObjectError(
                    "does not match its checksum; delete its folder to fall back to the one before",
                    url=self._store.url,
                    key=part.key,
                )
            pieces.append(safetensors.torch.load(data)["rows"])
        return torch.cat(pieces).reshape(record.shape)

    def _delete(self, step: int) -> None:
        """The manifest first: what has none does not exist."""
        folder = self._folder(step)
        self._store.delete(f"{folder}{_MANIFEST}")
        for key in list(self._store.keys(folder)):
            self._store.delete(key)

    def _folder(self, step: int) -> str:
        return f"{self._prefix}step-{step:08d}/"
