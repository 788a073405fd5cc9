"""Rows of a synthetic world, stored as the features that fire in each row.

A row is x = sum_i a_i d_i + bias, over its features i. A world's folder contains the directions
d_i, the bias and, for training and for scoring, which features fire and their strengths a_i. This
takes a tenth of the bytes of the rows, and is also the ground truth.

Imports only numpy and torch, because sae-lens's Python, where dist_sae is not installed, imports
this too.
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
        """Directions of the features, [features, d_in]."""
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
        """Return the rows with these numbers, [rows, d_in], unscaled."""
        starts, features, strengths = self._fired(which)
        x = F.embedding_bag(
            features, self.directions, starts, mode="sum", per_sample_weights=strengths
        )
        return x + self._bias

    def feature_strengths(self, which: NDArray[np.int64]) -> Tensor:
        """Return the strength of each feature in the rows with these numbers, [rows, features]."""
        starts, features, strengths = self._fired(which)
        counts = starts.diff(append=starts.new_tensor([len(features)]))
        fired = torch.zeros(len(which), len(self.directions))
        fired[torch.arange(len(which)).repeat_interleave(counts), features] = strengths
        return fired

    def batches(self, size: int, steps: int, seed: int) -> Iterator[Tensor]:
        """Yield `steps` batches. Every pass over the rows has another random order, from `seed`."""
        left, order = np.empty(0, np.int64), np.random.default_rng(seed)
        for _ in range(steps):
            while len(left) < size:
                left = np.concatenate([left, order.permutation(len(self))])
            yield self.batch(left[:size])
            left = left[size:]

    def _fired(self, which: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Return where each row's entries start, and the features and strengths of all entries."""
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
    """Writer that collects the features that fire, and saves them as one part of a world."""

    def __init__(self) -> None:
        self._counts: list[NDArray[np.int64]] = []
        self._features: list[NDArray[np.int32]] = []
        self._strengths: list[NDArray[np.float32]] = []

    def add(self, fired: Tensor) -> None:
        """Add rows, given as the strength of each feature, [rows, features], dense or sparse."""
        entries = fired.to_sparse().coalesce() if not fired.is_sparse else fired.coalesce()
        active = entries.values() > 0
        row, feature = entries.indices()[:, active]
        self._counts.append(torch.bincount(row, minlength=len(fired)).numpy())
        self._features.append(feature.int().numpy())
        self._strengths.append(entries.values()[active].float().numpy())

    def write(self, folder: Path, part: str) -> None:
        """Write all added rows."""
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(self._counts))])
        arrays = (starts, np.concatenate(self._features), np.concatenate(self._strengths))
        for name, array in zip(_PARTS, arrays, strict=True):
            np.save(folder / f"{part}-{name}.npy", array)
