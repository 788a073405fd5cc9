"""Rows of a synthetic world, kept as the features that fire in each.

A row is x = sum over its features i of a_i d_i, plus a bias. A folder holds the directions d_i, the
bias and, for training and for scoring, which features fire how strongly: a tenth of the bytes of
the rows, and the ground truth as well.

sae-lens's Python reads this too, where dist_sae is not installed: numpy and torch alone.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

TRAINING, HELDOUT = "training", "heldout"
_PARTS = ("starts", "features", "strengths")


class Rows:
    """Rows of one part of a world.

    Args:
        folder: The world's folder.
        part: `TRAINING` or `HELDOUT`.
    """

    def __init__(self, folder: Path, part: str) -> None:
        self.directions = torch.from_numpy(np.load(folder / "directions.npy"))
        """[features, d_in]"""
        self._bias = torch.from_numpy(np.load(folder / "bias.npy"))
        self._starts, self._features, self._strengths = (
            np.load(folder / f"{part}-{name}.npy", mmap_mode="r") for name in _PARTS
        )

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def d_in(self) -> int:
        """Width of the rows."""
        return self.directions.shape[1]

    def batch(self, which: NDArray[np.int64]) -> Tensor:
        """The rows with these numbers, [rows, d_in], in their own scale."""
        starts, features, strengths = self._fired(which)
        x = F.embedding_bag(
            features, self.directions, starts, mode="sum", per_sample_weights=strengths
        )
        return x + self._bias

    def truth(self, which: NDArray[np.int64]) -> Tensor:
        """How strongly each feature fires in the rows with these numbers, [rows, features]."""
        starts, features, strengths = self._fired(which)
        counts = starts.diff(append=starts.new_tensor([len(features)]))
        fired = torch.zeros(len(which), len(self.directions))
        fired[torch.arange(len(which)).repeat_interleave(counts), features] = strengths
        return fired

    def batches(self, size: int, steps: int, seed: int) -> Iterator[Tensor]:
        """The first `steps` batches of the rows in an order of the seed's; whole passes repeat."""
        left, order = np.empty(0, np.int64), np.random.default_rng(seed)
        for _ in range(steps):
            while len(left) < size:
                left = np.concatenate([left, order.permutation(len(self))])
            yield self.batch(left[:size])
            left = left[size:]

    def _fired(self, which: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Where each row's entries start, and the features and strengths of all entries."""
        first = self._starts[which]
        counts = self._starts[which + 1] - first
        starts = np.cumsum(counts) - counts
        places = np.arange(counts.sum()) + np.repeat(first - starts, counts)
        return (
            torch.from_numpy(starts),
            torch.from_numpy(self._features[places].astype(np.int64)),
            torch.from_numpy(self._strengths[places]),
        )


class RowsWriter:
    """Collects the features that fire, and writes the part of a world's folder."""

    def __init__(self) -> None:
        self._counts: list[NDArray[np.int64]] = []
        self._features: list[NDArray[np.int32]] = []
        self._strengths: list[NDArray[np.float32]] = []

    def add(self, fired: Tensor) -> None:
        """Take in rows: how strongly each feature fires, [rows, features], dense or sparse."""
        entries = fired.to_sparse().coalesce() if not fired.is_sparse else fired.coalesce()
        active = entries.values() > 0
        row, feature = entries.indices()[:, active]
        self._counts.append(torch.bincount(row, minlength=len(fired)).numpy())
        self._features.append(feature.int().numpy())
        self._strengths.append(entries.values()[active].float().numpy())

    def write(self, folder: Path, part: str) -> None:
        """Write all rows taken in."""
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(self._counts))])
        arrays = (starts, np.concatenate(self._features), np.concatenate(self._strengths))
        for name, array in zip(_PARTS, arrays, strict=True):
            np.save(folder / f"{part}-{name}.npy", array)
