"""Schedules, as pure functions of the step or of the share of the run that is done."""

GROWTH = 9  # running means keep n / (n + 9) after n updates, so they cover the last tenth


def learning_rate(
    step: int, steps: int, *, peak: float, warmup_steps: int, decay_share: float
) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay_share` of the run.

    Args:
        step: From 0; the update that takes the run from `step` to `step + 1`.
        steps: Steps of the whole run.
        peak: Rate in the constant part.
        warmup_steps: Steps of the rise; the first update has peak / warmup_steps.
        decay_share: Share of steps of the fall; the last update has peak / (decay_share * steps).
    """
    rise = (step + 1) / warmup_steps if warmup_steps else 1.0
    fall = (steps - step) / (decay_share * steps) if decay_share else 1.0
    return peak * min(1.0, rise, fall)


def annealed(progress: float, k: int, start: int | None, share: float) -> int:
    """Active latents per row: from `start` linearly to `k` over the first `share` of the run."""
    if start is None or progress >= share:
        return k
    return round(start + (k - start) * progress / share)


def warmed_up(progress: float, coefficient: float, share: float) -> float:
    """A coefficient that rises linearly from 0 over the first `share` of the run."""
    return coefficient * min(1.0, progress / share) if share else coefficient
