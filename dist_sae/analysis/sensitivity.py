"""Sensitivity of a latent: does it fire wherever its concept is present, and only there?

For passages i with weight w_i, concept c_i in {0, 1} and largest activation F_i:

    sensitivity(t) = sum w c [F > t] / sum w c
    precision(t)   = sum w c [F > t] / sum w [F > t]

A weight is one over the probability with which a passage was drawn (Horvitz and Thompson 1952), so
the filter that found most of the passages does not bias the estimates. The bootstrap for intervals
resamples documents, not passages.

Source: the question and the filtered data set are from "Measuring feature sensitivity using dataset
filtering" (Turner, Jermyn, Batson 2024), which this reconstructs; weights, random stratum and
intervals are our own.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.analysis.judges import HAS, LEVELS
from dist_sae.analysis.law import Interval, bootstrap_counts, interval
from dist_sae.analysis.passages import SHARES, Judged
from dist_sae.errors import ArgumentError
from dist_sae.report.charts import Line, render_lines
from dist_sae.report.outcome import Findings

LEAST_PASSAGES = 10
"""Fewest passages with the concept, and fewest without it, for an estimate."""
LEAST_PEERS = 19
"""Fewest other latents among which a latent can be judged to stand out."""
_AS_GOOD = 0.05
"""Largest share of latents that do as well as one that stands out, itself included."""
_GROUPS = 2000
"""Most groups of documents, which the bootstrap draws as a whole."""
_CURVE = tuple(step / 20 for step in range(20))


class AtThreshold(NamedTuple):
    """Estimates for one threshold."""

    share: float
    """Threshold as a share of the largest activation. The latent fires if it exceeds it."""
    sensitivity: Interval
    precision: Interval
    f1: Interval


class Measured(NamedTuple):
    """Estimates of how well a latent detects a concept."""

    latent: int
    judge: str
    passages: int
    with_concept: int
    at: Sequence[AtThreshold]
    naive: Sequence[AtThreshold] | None
    """Estimates like `at` from the filter's passages alone, each counted once. None without a
    filter."""
    auroc: Interval
    """Probability that, of a passage with and one without the concept, the first has the larger
    activation. At .5 the latent does not detect the concept."""
    filter_recall: Interval | None
    """Share of the passages with the concept that the filter passes. None without a filter."""
    outside: int | None
    """Number of drawn passages with the concept outside the filter. None without a filter."""
    means: Sequence[float | None]
    """Mean activation on passages of each level. None for a level without passages."""
    curve: Sequence[tuple[float, float]]
    """Thresholds, as shares of the largest activation, and the sensitivity at each."""
    peers: int
    """Number of other latents, drawn at random, that were measured on the same passages."""
    as_good: int
    """Number of peers whose best F1 over all thresholds is at least this latent's best."""


def measure(latent: int, judge: str, largest: float, judged: Judged, seed: int = 0) -> Measured:
    """Estimate how well a latent detects a concept.

    Args:
        latent: Number of the latent.
        judge: Name of the judge.
        largest: The latent's largest activation on any row.
        judged: Judged passages.
        seed: Seed of the bootstrap.

    Raises:
        ArgumentError: Too few passages have the concept, or too few lack it.
    """
    has = judged.level >= HAS
    n, positives = len(has), int(has.sum())
    if min(positives, n - positives) < LEAST_PASSAGES:
        raise ArgumentError(
            f"{judge}: {positives} of {n:,} judged passages have the concept; estimates need "
            f"{LEAST_PASSAGES} with it and {LEAST_PASSAGES} without: judge more passages, or widen "
            f"the concept"
        )
    group = np.unique(judged.document, return_inverse=True)[1] % _GROUPS
    groups = int(group.max()) + 1
    draws = bootstrap_counts(groups, seed)

    def total(values: NDArray[Any]) -> NDArray[np.float64]:
        """Return the sum over the sample, then over each of its replicates."""
        return np.asarray(draws @ np.bincount(group, values, groups))

    weight = judged.weight
    outside = ~judged.in_filter
    found = float(weight @ has)
    # if no drawn passage outside the filter has the concept, no replicate has one either; by the
    # rule of three there are at most 3 / chance such passages (Hanley and Lippman-Hand 1983)
    unseen = 3 * float(weight[outside].mean()) if outside.any() and not has[outside].any() else 0.0
    seen = found / (found + unseen)

    def of_concept(replicates: NDArray[np.float64], seen: float) -> Interval:
        """Return a share of the concept's passages, with an interval that covers unseen ones."""
        value, low, high = interval(replicates)
        return Interval(value, low and low * seen, high and 1 - (1 - high) * seen)

    def at(share: float, weight: NDArray[np.float64], seen: float) -> AtThreshold:
        fires = judged.act > share * largest
        both, concept = total(weight * (has & fires)), total(weight * has)
        firing = total(weight * fires)
        with np.errstate(invalid="ignore", divide="ignore"):
            sensitive, precise = both / concept, both / firing
            f1 = 2 * both / (concept + firing)
        return AtThreshold(share, of_concept(sensitive, seen), interval(precise), interval(f1))

    filtered = judged.in_filter.astype(np.float64) if outside.any() else None
    area, influence = _auroc(judged.act, has, weight)
    levels = [weight * (judged.level == level) for level in LEVELS]
    thresholds = [at(share, weight, seen) for share in SHARES]
    f1 = max((each.f1.value or 0.0 for each in thresholds), default=0.0)
    return Measured(
        latent=latent,
        judge=judge,
        passages=n,
        with_concept=positives,
        at=thresholds,
        naive=None if filtered is None else [at(share, filtered, 1.0) for share in SHARES],
        auroc=interval(area + total(influence) - influence.sum()),
        filter_recall=(
            None
            if filtered is None
            else of_concept(total(weight * has * filtered) / total(weight * has), seen)
        ),
        outside=None if filtered is None else int(has[outside].sum()),
        means=[float(w @ judged.act / w.sum()) if w.any() else None for w in levels],
        curve=[
            (share, float((weight * has) @ (judged.act > share * largest) / found))
            for share in _CURVE
        ],
        peers=len(judged.peers),
        as_good=int((judged.peers >= f1).sum()),
    )


def sensitivity(measured: Sequence[Measured], caveats: Sequence[str] = ()) -> Findings:
    """Report the estimates.

    Args:
        measured: Estimates for pairs of a latent and a concept.
        caveats: Caveats of the judges.
    """
    return Findings(
        numbers={
            "asked": [_numbers(each) for each in measured],
            "mean_sensitivity": float(np.mean([each.at[0].sensitivity.value for each in measured])),
        },
        summary=[line for each in measured for line in _sentences(each)],
        caveats=[*caveats, *(line for each in measured for line in _caveats(each))],
        tables={"thresholds": _table(measured)},
        figures=[
            render_lines(
                "Sensitivity by threshold",
                [Line(str(each.latent), *zip(*each.curve, strict=True)) for each in measured],
                x_label="threshold, as a share of the latent's largest activation",
                from_zero=True,
            )
        ],
    )


def _auroc(
    act: NDArray[np.float32], has: NDArray[np.bool_], weight: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """Return the weighted area under the ROC curve, and each passage's influence on it.

    The influences sum to 0.

    Source: DeLong, DeLong and Clarke-Pearson 1988, with weights.
    """
    values, place = np.unique(act, return_inverse=True)
    sums = [np.bincount(place, weight * side, len(values)) for side in (~has, has)]
    below, above = (each.cumsum() - each / 2 for each in sums)  # ties count half
    without, concept = (each.sum() for each in sums)
    share = np.where(has, below[place] / without, 1 - above[place] / concept)
    area = float((weight * has) @ share / concept)
    return area, weight * (share - area) / np.where(has, concept, without)


def _sentences(measured: Measured) -> list[str]:
    name = f"latent {measured.latent}, {measured.judge}"
    first, last = measured.at[0], measured.at[-1]
    lines = [
        f"{name}: sensitivity {shown(first.sensitivity)}, precision {shown(first.precision)} at "
        f"any activation; {shown(last.sensitivity)} and {shown(last.precision)} above half of "
        f"its largest; AUROC {shown(measured.auroc)}"
    ]
    if not beats_chance(measured):
        lines.append(f"{name}: nothing found: it does not detect the concept better than chance")
    elif not stands_out(measured):
        lines.append(
            f"{name}: nothing found beyond other latents: {measured.as_good} of {measured.peers} "
            f"latents drawn at random have as large an F1"
        )
    if measured.filter_recall is not None and measured.naive is not None:
        naive = measured.naive[0]
        lines.append(
            f"{name}: the filter passes {shown(measured.filter_recall)} of the passages with the "
            f"concept; from these alone, sensitivity would be {shown(naive.sensitivity)} and "
            f"precision {shown(naive.precision)}"
        )
    return lines


def beats_chance(measured: Measured) -> bool:
    """Return whether activations are larger where the concept is present, beyond chance."""
    return measured.auroc.low is not None and measured.auroc.low > 1 / 2


def stands_out(measured: Measured) -> bool:
    """Return whether few random latents do as well on the concept; True if too few were tried."""
    if measured.peers < LEAST_PEERS:
        return True
    return (1 + measured.as_good) / (1 + measured.peers) <= _AS_GOOD


def _caveats(measured: Measured) -> list[str]:
    lines = []
    if measured.peers < LEAST_PEERS:
        lines.append(
            f"latent {measured.latent}, {measured.judge}: only {measured.peers} other latents "
            f"fire, too few to tell whether it stands out among them"
        )
    if measured.with_concept < 10 * LEAST_PASSAGES:
        lines.append(
            f"latent {measured.latent}, {measured.judge}: only {measured.with_concept} of the "
            f"{measured.passages:,} judged passages have the concept"
        )
    if measured.outside is not None and measured.outside < LEAST_PASSAGES:
        lines.append(
            f"latent {measured.latent}, {measured.judge}: only {measured.outside} of the passages "
            f"drawn outside the filter have the concept, so little is known about what the "
            f"filter misses; raise --share"
        )
    return lines


def _numbers(measured: Measured) -> dict[str, Any]:
    def each(found: Sequence[AtThreshold]) -> list[dict[str, Any]]:
        return [
            {
                "share_of_largest": at.share,
                "sensitivity": at.sensitivity._asdict(),
                "precision": at.precision._asdict(),
                "f1": at.f1._asdict(),
            }
            for at in found
        ]

    return {
        "latent": measured.latent,
        "judge": measured.judge,
        "passages": measured.passages,
        "with_concept": measured.with_concept,
        "thresholds": each(measured.at),
        "naive": measured.naive and each(measured.naive),
        "auroc": measured.auroc._asdict(),
        "drawn_outside_filter_with_concept": measured.outside,
        "filter_recall": measured.filter_recall and measured.filter_recall._asdict(),
        "mean_activation_by_level": list(measured.means),
        "other_latents": measured.peers,
        "others_as_good": measured.as_good,
        "tells": beats_chance(measured),
        "stands_out": stands_out(measured),
    }


def _table(measured: Sequence[Measured]) -> pa.Table:
    rows = [
        {
            "latent": each.latent,
            "judge": each.judge,
            "weighted": weighted,
            "share_of_largest": at.share,
            **{
                f"{name}{end}": getattr(getattr(at, name), field)
                for name in ("sensitivity", "precision", "f1")
                for end, field in (("", "value"), ("_low", "low"), ("_high", "high"))
            },
        }
        for each in measured
        for weighted, found in ((True, each.at), (False, each.naive or ()))
        for at in found
    ]
    return pa.Table.from_pylist(rows)


def shown(found: Interval) -> str:
    """Format a share with its interval, for a sentence."""
    if found.value is None or math.isnan(found.value):
        return "unknown"
    if found.low is None or found.high is None:
        return f"{found.value:.2f}"
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
