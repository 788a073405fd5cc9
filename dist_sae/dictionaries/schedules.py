"""Schedules, as pure functions of the step or of the run's progress."""

GROWTH = 9  # running means keep n / (n + 9) after n updates, so they cover the last tenth


def learning_rate(
    step: int, steps: int, *, peak: float, warmup_steps: int, decay_share: float
) -> float:
    """Compute the learning rate: linear warm-up, constant, then linear decay to zero.

    Args:
        step: Number of the update, from 0: the one that takes the run from `step` to `step + 1`.
        steps: Steps of the whole run.
        peak: Learning rate in the constant part.
        warmup_steps: Steps of the warm-up. The first update has peak / warmup_steps.
        decay_share: Share of the steps, at the end of the run, in which the rate decays. The last
            update has peak / (decay_share * steps).
    """
    rise = (step + 1) / warmup_steps if warmup_steps else 1.0
    fall = (steps - step) / (decay_share * steps) if decay_share else 1.0
    return peak * min(1.0, rise, fall)


def annealed(progress: float, k: int, start: int | None, share: float) -> int:
    """Interpolate k, the active latents per row, from `start` over the first `share` of the run."""
    if start is None or progress >= share:
        return k
    return round(start + (k - start) * progress / share)


def warmed_up(progress: float, coefficient: float, share: float) -> float:
    """Scale a coefficient that rises linearly from 0 over the first `share` of the run."""
    return coefficient * min(1.0, progress / share) if share else coefficient
