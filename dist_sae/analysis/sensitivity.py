"""Sensitivity: does a latent fire wherever its concept is, and only there?

For passages i with weight w_i, concept c_i in {0, 1} and largest activation F_i:

    sensitivity(t) = sum w c [F > t] / sum w c
    precision(t)   = sum w c [F > t] / sum w [F > t]

Weights are one over the chance with which a passage was drawn (Horvitz and Thompson 1952), so the
filter that found most of the passages does not bias them. Intervals draw documents, not passages.

Source: the question and the use of a filtered data set are those of "Measuring feature sensitivity
using dataset filtering" (Turner, Jermyn, Batson 2024), of which this is a reconstruction; weights,
random stratum and intervals are ours.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_sae.analysis.judges import HAS, LEVELS
from dist_sae.analysis.law import Interval, interval, resampled
from dist_sae.analysis.passages import SHARES, Judged
from dist_sae.errors import ArgumentError
from dist_sae.report.charts import Line, render_lines
from dist_sae.report.outcome import Findings

LEAST_PASSAGES = 10
"""Passages with the concept, and without, below which nothing is estimated."""
LEAST_PEERS = 19
"""Other latents below which it is not told whether a latent stands out among them."""
_AS_GOOD = 0.05
"""Share of the other latents that may be as good as one that stands out."""
_GROUPS = 2000
"""Documents are joined to this many groups at most, which are drawn whole."""
_CURVE = tuple(step / 20 for step in range(20))


class AtThreshold(NamedTuple):
    """Estimates for one threshold."""

    share: float
    """The threshold, as a share of the largest activation; the latent has to exceed it."""
    sensitivity: Interval
    precision: Interval
    f1: Interval


class Measured(NamedTuple):
    """What is estimated of a latent and a concept."""

    latent: int
    judge: str
    passages: int
    with_concept: int
    at: Sequence[AtThreshold]
    naive: Sequence[AtThreshold] | None
    """The same from the filter's passages alone, each counted once; None without a filter."""
    auroc: Interval
    """Chance that a passage with the concept has the larger activation of two; .5 says nothing."""
    filter_recall: Interval | None
    """Share of the passages with the concept that the filter passes."""
    outside: int | None
    """Drawn passages outside the filter with the concept; None without a filter."""
    means: Sequence[float | None]
    """Mean activation on passages of each level."""
    curve: Sequence[tuple[float, float]]
    """Share of the largest activation, and sensitivity."""
    peers: int
    """Other latents, drawn at random, that were measured on the same passages."""
    as_good: int
    """Peers whose best F1 over all thresholds is at least this latent's best."""


def measure(latent: int, judge: str, largest: float, judged: Judged, seed: int = 0) -> Measured:
    """Estimate what a latent says of a concept.

    Args:
        latent: Its number.
        judge: Name of the judge.
        largest: The latent's largest activation, on any row.
        judged: Passages.
        seed: Of the bootstrap.

    Raises:
        ArgumentError: Too few passages have the concept, or lack it.
    """
    has = judged.level >= HAS
    n, positives = len(has), int(has.sum())
    if min(positives, n - positives) < LEAST_PASSAGES:
        raise ArgumentError(
            f"{judge}: {positives} of {n:,} judged passages have the concept; estimates need "
            f"{LEAST_PASSAGES} with it and {LEAST_PASSAGES} without: judge more, or widen it"
        )
    group = np.unique(judged.document, return_inverse=True)[1] % _GROUPS
    groups = int(group.max()) + 1
    draws = resampled(groups, seed)

    def total(values: NDArray[Any]) -> NDArray[np.float64]:
        """The sum over the sample, then over each of its replicates."""
        return np.asarray(draws @ np.bincount(group, values, groups))

    weight = judged.weight
    outside = ~judged.in_filter
    found = float(weight @ has)
    # no replicate has a concept outside the filter that no drawn passage has; by the rule of three
    # there are at most 3 / chance of them (Hanley and Lippman-Hand 1983)
    unseen = 3 * float(weight[outside].mean()) if outside.any() and not has[outside].any() else 0.0
    seen = found / (found + unseen)

    def of_concept(replicates: NDArray[np.float64], seen: float) -> Interval:
        """A share of the passages with the concept, of which a share was seen."""
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
    """Say what was measured.

    Args:
        measured: Latents and concepts.
        caveats: Of the judges.
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
    """Weighted area under the ROC curve, and each passage's influence on it (they sum to 0).

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
        f"any activation; {shown(last.sensitivity)} and {shown(last.precision)} from half of its "
        f"largest on; AUROC {shown(measured.auroc)}"
    ]
    if not tells(measured):
        lines.append(f"{name}: says nothing of the concept beyond chance")
    elif not stands_out(measured):
        lines.append(
            f"{name}: says nothing that others do not: {measured.as_good} of {measured.peers} "
            f"latents drawn at random have as large an F1"
        )
    if measured.filter_recall is not None and measured.naive is not None:
        naive = measured.naive[0]
        lines.append(
            f"{name}: the filter passes {shown(measured.filter_recall)} of the passages with the "
            f"concept; by these alone sensitivity would be {shown(naive.sensitivity)}, precision "
            f"{shown(naive.precision)}"
        )
    return lines


def tells(measured: Measured) -> bool:
    """Whether activations are larger where the concept is, beyond chance."""
    return measured.auroc.low is not None and measured.auroc.low > 1 / 2


def stands_out(measured: Measured) -> bool:
    """Whether few random latents do as well on the concept; True if too few were tried."""
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
            f"drawn outside the filter have the concept, so what the filter misses is hardly "
            f"known; raise --share"
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
        "tells": tells(measured),
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
    """A share with its interval, for a sentence."""
    if found.value is None or math.isnan(found.value):
        return "unknown"
    if found.low is None or found.high is None:
        return f"{found.value:.2f}"
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
