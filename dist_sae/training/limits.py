"""Describes in one line which part of a run currently limits its speed. Pure."""

from collections.abc import Mapping

from dist_sae.telemetry.metric import OTHERS

_STALLED = 0.1  # share of the time; a longer stall is reported before anything else
SLOW = 1.2
"""A rank is slow if its working time is at least this multiple of the median rank's."""
_DENSE = 0.5  # share of step time from which on the encoder product is reported as the limit
_IGNORED = ("begin", OTHERS)
_NAMES = {
    "ranks": "waiting for other ranks",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimiser": "the optimiser",
    "rest": "other work in a step",
}


def describe_limit(
    phases: Mapping[str, float],
    product_share: float | None = None,
    slowest_stage: str | None = None,
    slow_rank: str | None = None,
    *,
    all_produced: bool = False,
) -> str:
    """Name the one thing that must become faster for the run to become faster.

    Args:
        phases: Seconds of training by phase (`telemetry.metric.PHASES`); empty before training.
            `begin` is ignored because it is over, and `others` because it is other jobs' time.
        product_share: Share of step time that the bare encoder product takes, if known.
        slowest_stage: The producers' slowest stage, if known.
        slow_rank: Description of the rank that others wait for, if any (`describe_slow`).
        all_produced: Whether every unit exists.
    """
    phases = {phase: spent for phase, spent in phases.items() if phase not in _IGNORED}
    total = sum(phases.values())
    if not total:
        return _before_training(slowest_stage, all_produced=all_produced)
    shares = {phase: seconds / total for phase, seconds in phases.items()}
    if (waiting := shares.get("wait", 0.0)) > _STALLED:
        if all_produced:
            return (
                f"the store: all units exist, but trainers wait for reads {waiting:.0%} of the time"
            )
        of_producers = f"; {_stage(slowest_stage)}" if slowest_stage else ""
        return f"data: trainers wait {waiting:.0%} of the time{of_producers}"
    if (saving := shares.get("save", 0.0)) > _STALLED:
        return f"saving: training is paused {saving:.0%} of the time"
    return _of_steps(shares, product_share, slow_rank)


def _of_steps(
    shares: Mapping[str, float], product_share: float | None, slow_rank: str | None
) -> str:
    if slow_rank and shares.get("ranks", 0.0) > _STALLED:
        return f"{slow_rank}; ranks wait {shares['ranks']:.0%} of the time"
    if product_share is not None and product_share >= _DENSE:
        return f"the encoder product: {product_share:.0%} of step time"
    phase = max(shares, key=lambda phase: shares[phase])
    product = "" if product_share is None else f"; the encoder product: {product_share:.0%}"
    return f"{_NAMES.get(phase, phase)}: {shares[phase]:.0%} of step time{product}"


def describe_slow(rank: str, host: str, ratio: float) -> str | None:
    """Describe the slowest rank. Return None if it is not slow.

    Args:
        rank: Number of the rank.
        host: Host of the rank.
        ratio: The rank's working time divided by the median rank's.
    """
    return (
        f"rank {rank} ({host}) takes {ratio:.1f} x the median rank's time"
        if ratio >= SLOW
        else None
    )


def _before_training(slowest_stage: str | None, *, all_produced: bool) -> str:
    if all_produced:
        return "the trainers: they have not started yet"
    if slowest_stage is None:
        return "data: no producer has reported yet"
    return f"data: {_stage(slowest_stage)}"


def _stage(slowest: str) -> str:
    return f"producers' slowest stage: {slowest}"
