"""What limits a run now, in a sentence. Pure."""

from collections.abc import Mapping

_STALLED = 0.1  # share of the time from which standing still is what to mend first
_DENSE = 0.5  # share of a step from which the product is what limits it
_NAMES = {
    "ranks": "waiting for other ranks",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimiser": "the optimiser",
    "rest": "what is beside the passes",
}


def describe_limit(
    phases: Mapping[str, float],
    product_share: float | None = None,
    slowest_stage: str | None = None,
    *,
    all_produced: bool = False,
) -> str:
    """The one thing that would have to be faster for the run to be.

    Args:
        phases: Seconds of training by phase (`telemetry.metrics.PHASES`); empty while there is no
            training. The beginning is over, and limits nothing.
        product_share: Of a step, what the bare encoder product takes, where it is known.
        slowest_stage: Of the producers; None if none has been heard of.
        all_produced: Whether every unit exists.
    """
    phases = {phase: seconds for phase, seconds in phases.items() if phase != "begin"}
    total = sum(phases.values())
    if not total:
        return _before_training(slowest_stage, all_produced=all_produced)
    shares = {phase: seconds / total for phase, seconds in phases.items()}
    if (waiting := shares.get("wait", 0.0)) > _STALLED:
        if all_produced:
            return f"the store: all units are there, and trainers wait {waiting:.0%} of the time"
        of_producers = f"; {_stage(slowest_stage)}" if slowest_stage else ""
        return f"data: trainers wait {waiting:.0%} of the time{of_producers}"
    if (saving := shares.get("save", 0.0)) > _STALLED:
        return f"saving: training stands still {saving:.0%} of the time"
    if product_share is not None and product_share >= _DENSE:
        return f"the encoder product: {product_share:.0%} of a step"
    phase = max(shares, key=lambda phase: shares[phase])
    product = "" if product_share is None else f"; the encoder product: {product_share:.0%}"
    return f"{_NAMES.get(phase, phase)}: {shares[phase]:.0%} of a step{product}"


def _before_training(slowest_stage: str | None, *, all_produced: bool) -> str:
    if all_produced:
        return "the trainers: they have not begun yet"
    if slowest_stage is None:
        return "data: no producer has said anything yet"
    return f"data: {_stage(slowest_stage)}"


def _stage(slowest: str) -> str:
    return f"producers' slowest stage: {slowest}"
