"""Risk that a run has too few rows: rows per latent, firings of rare features, dead latents."""

import math
from typing import Any

import numpy as np

from dist_sae.planning.sizes import RunSizes

ROWS_PER_LATENT = 2500
"""Rows per latent below which a wide dictionary is considered to be short of data."""
_FREQUENCIES = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
_LEARNT_FIRINGS = 1000  # that a feature needs in training to be learned; a rule of thumb
_STEPS = 10_000  # maximum number of ranks at which Zipf's law is evaluated


def compute_risk(sizes: RunSizes) -> dict[str, Any]:
    """Compute rows per latent, expected firings, and the share of latents that are dead by chance.

    The share of dead latents assumes that firings follow Zipf's law: latent i fires on a share
    p_i ~ 1 / i of the rows, at most half, with sum p_i = L0. A latent counts as dead if it does not
    fire for `sae.dead_after_rows` rows. By chance, that has the probability (1 - p_i) ^ rows.
    """
    run = sizes.run
    n, rows, l0 = run.sae.n_latents, run.steps * run.train.batch_rows, sizes.active
    ranks = np.unique(np.geomspace(1, n, _STEPS).astype(np.int64))
    counts = np.diff(ranks, append=n + 1)
    harmonic = math.log(n) + 0.5772
    p = np.minimum(0.5, l0 / (harmonic * ranks))
    idle = np.exp(run.dead_after_rows * np.log1p(-p))
    return {
        "rows_per_latent": rows / n,
        "rows_per_latent_wanted": ROWS_PER_LATENT,
        "rows_wanted": ROWS_PER_LATENT * n,
        "expected_firings": {f"of_p_{p:.0e}": rows * p for p in _FREQUENCIES},
        "p_of_1000_firings": _LEARNT_FIRINGS / rows,
        "dead_by_chance_share": float((idle * counts).sum() / n),
    }
