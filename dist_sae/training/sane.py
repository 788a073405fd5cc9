"""Whether a dictionary becomes one that somebody could want: sparse, and not mostly dead."""

from collections.abc import Mapping

from dist_sae.config import Run
from dist_sae.config.sae import PenalisedConfig

_FROM_PROGRESS = 0.25  # of the run: coefficients have risen, and most that will die has died
_MOST_L0 = 0.5  # per dimension of the rows: with more, codes are no sparser than the rows
_MOST_DEAD = 0.3


def doubt(run: Run, d_in: int, step: int, numbers: Mapping[str, float]) -> str | None:
    """What is wrong with the sparsity or the dead latents after a step, and what helps.

    Args:
        run: The run.
        d_in: Width of the activations.
        step: Steps done.
        numbers: `l0_latents`, and `dead_share` once it can be known.

    Returns:
        One line, or None where nothing is wrong or it is too early to say.
    """
    if step < _FROM_PROGRESS * run.steps:
        return None
    key = "sae.sparsity" if isinstance(run.sae, PenalisedConfig) else "sae.k"
    more, less = ("lower", "raise") if key == "sae.sparsity" else ("raise", "lower")
    l0, dead = numbers["l0_latents"], numbers.get("dead_share", 0.0)
    if l0 > _MOST_L0 * d_in:
        found = f"{l0:.0f} latents are active in a row of {d_in} numbers, which is not sparse"
        return f"{found}; {less} {key}"
    if l0 < 1:
        return f"{l0:.2g} latents are active in a row, so most rows have no code; {more} {key}"
    if dead > _MOST_DEAD:
        found = f"{dead:.0%} of the latents are dead (sae.dead_after_rows: {run.dead_after_rows})"
        return f"{found}; {more} {key}, or try a lower train.lr or fewer sae.n_latents"
    return None
