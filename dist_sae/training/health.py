"""Warns of a dictionary that trains badly: not sparse, without active latents, or mostly dead."""

from collections.abc import Mapping

from dist_sae.config import Run

# share of the run; by then, coefficients have warmed up and most latents that will die are dead
_FROM_PROGRESS = 0.25
_MOST_L0 = 0.5  # maximum L0 per dimension of the rows; above it, codes are no sparser than rows
_MOST_DEAD = 0.3


def training_warning(run: Run, d_in: int, step: int, numbers: Mapping[str, float]) -> str | None:
    """Describe a problem with sparsity or dead latents, and the remedy.

    Args:
        run: The run.
        d_in: Width of the activations.
        step: Steps done.
        numbers: `l0_latents`, and `dead_share` once it is known.

    Returns:
        One line, or None if there is no problem or it is too early to tell.
    """
    if step < _FROM_PROGRESS * run.steps:
        return None
    key = f"sae.{run.sae.sparsity_key}"
    more, less = ("lower", "raise") if key == "sae.sparsity" else ("raise", "lower")
    l0, dead = numbers["l0_latents"], numbers.get("dead_share", 0.0)
    if l0 > _MOST_L0 * d_in:
        found = f"{l0:.0f} latents are active per row of {d_in} numbers, which is not sparse"
        return f"{found}; {less} {key}"
    if l0 < 1:
        return (
            f"{l0:.2g} latents are active per row, so most rows have no active latent; {more} {key}"
        )
    if dead > _MOST_DEAD:
        found = f"{dead:.0%} of the latents are dead (sae.dead_after_rows: {run.dead_after_rows})"
        return f"{found}; {more} {key}, or try a lower train.lr or fewer sae.n_latents"
    return None
