"""Nearest latents in another run, and the rows on which two latents both fire."""

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from dist_sae.checkpoint.layout import Checkpoints
from dist_sae.checkpoint.trained import normalisers_of, open_step, trained_run
from dist_sae.comparison.matched import check_matchable, scales_of_targets
from dist_sae.config import Run
from dist_sae.errors import ConfigError
from dist_sae.index.decoder import Decoder
from dist_sae.index.query import Index, NearestLatent
from dist_sae.report.terminal import Explorer, Style
from dist_sae.storage import open_store


class CommonRows(NamedTuple):
    """Numbers of rows on which a latent of each run fires, in the units that both indexes have."""

    one: int
    other: int
    both: int


class OtherRun:
    """Another run, whose latents are compared with the latents of a run.

    Args:
        one: The run.
        index: Index of the run.
        other: The other run. It must write the same sites of the same model.

    Raises:
        ConfigError: The runs cannot be compared, or a checkpoint that was indexed is gone.
        NoIndexError: The other run has no complete index.
    """

    def __init__(self, one: Run, index: Index, other: Run) -> None:
        check_matchable(one, other)
        self.name = other.name
        self.explorer = Explorer(other, None, Style())
        """Explorer of the other run's index."""
        self._indexes = index, self.explorer.index
        self._rows = _Directions(one, index), _Directions(other, self.explorer.index)
        widths = [rows.decoder.d_out for rows in self._rows]
        if widths[0] != widths[1]:
            raise ConfigError(
                f"{one.name} and {other.name}: have decoder rows of {widths[0]} and {widths[1]} "
                f"numbers; latents can be compared only if both runs use the same model"
            )

    def nearest(self, latent: int, n: int) -> list[tuple[NearestLatent, list[str]]]:
        """Return the `n` latents of the other run with the largest cosine of decoder rows.

        Each comes with some tokens that it fires on. The other decoder is read part by part if it
        takes more than half of `evaluate.memory_bytes`; else it stays in memory.

        Raises:
            CorruptObjectError: A checkpoint is damaged.
        """
        found = self._rows[1].nearest(self._rows[0].of(latent), n)
        index = self.explorer.index
        return [
            (near, self.explorer.brief(index.latent(near.latent))["fires_on"]) for near in found
        ]

    def common_rows(self, latent: int, other: int) -> CommonRows | None:
        """Count the rows on which each and both fire; None unless both store all activations.

        The indexes must also have the same plan.
        """
        one, two = (index.manifest for index in self._indexes)
        if one.plan != two.plan or min(one.postings_share, two.postings_share) < 1:
            return None
        units = np.intersect1d(one.units, two.units)
        rows = []
        for index, number in zip(self._indexes, (latent, other), strict=True):
            tables = list(index.postings(number))
            unit, row = (
                np.concatenate([t[name].to_numpy() for t in tables]) for name in ("unit", "row")
            )
            kept = np.isin(unit, units)
            rows.append(unit[kept].astype(np.int64) << 32 | row[kept])
        both = np.intersect1d(rows[0], rows[1], assume_unique=True)
        return CommonRows(len(rows[0]), len(rows[1]), len(both))


class _Directions:
    """Directions of an indexed dictionary's decoder rows, in the scale of the model."""

    def __init__(self, run: Run, index: Index) -> None:
        runs = open_store(run.store.runs, run.store.s3)
        checkpoints = Checkpoints(runs, run.name, run.train.keep_checkpoints)
        checkpoint = open_step(checkpoints, index.manifest.step, f"{runs.url}/{run.name}")
        if checkpoint.digest != index.manifest.checkpoint:
            raise ConfigError(
                f"{index.place}: was built from another checkpoint of step {checkpoint.step}; "
                f"build it again"
            )
        self.decoder = Decoder(checkpoint)
        self._scales = scales_of_targets(normalisers_of(trained_run(checkpoint, run), checkpoint))
        n_bytes = 4 * self.decoder.n_latents * self.decoder.d_out
        self._fits = 2 * n_bytes <= run.evaluate.memory_bytes

    def of(self, latent: int) -> Float[Tensor, " d_out"]:
        """Return the direction of one latent."""
        ((_, rows),) = self.decoder.parts(range(latent, latent + 1))
        return normalize(rows / self._scales, dim=1)[0]

    def nearest(self, direction: Float[Tensor, " d_out"], n: int) -> list[NearestLatent]:
        """Return the latents with the largest cosine to a direction."""
        if self._fits:
            cosines = self._all @ direction
        else:
            parts = self.decoder.parts()
            cosines = torch.cat([normalize(r / self._scales, dim=1) @ direction for _, r in parts])
        best = cosines.topk(min(n, len(cosines)))
        return [
            NearestLatent(*pair)
            for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    @cached_property
    def _all(self) -> Float[Tensor, "n_latents d_out"]:
        return torch.cat(
            [normalize(rows / self._scales, dim=1) for _, rows in self.decoder.parts()]
        )
