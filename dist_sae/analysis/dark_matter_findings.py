"""Findings of `dist-sae analyse dark-matter`, from the studies of one or more runs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import torch

from dist_sae.analysis.dark_matter import Study
from dist_sae.analysis.dark_matter_figures import Check, figures, overlap_table, rank_table
from dist_sae.analysis.error_parts import ENOUGH_ROWS
from dist_sae.analysis.seeds import Overlap
from dist_sae.analysis.tail import LEAST_ALIVE, Span, floor, forecast
from dist_sae.report.charts import short_number
from dist_sae.report.outcome import Findings

_WIDER = (2, 4, 10)
"""Multiples of the alive latents for which the tail is predicted."""
_WIDER_BY = 1.2
"""Factor of alive latents above which another dictionary counts as wider."""
_EXPLAINS = 0.05
"""Least margin by which a decoder must explain more of the rows than of rotated ones to have found
anything."""
_UNIQUE = 0.8
"""Share of unique energy above which latents stand for features that no other latent describes."""
_PREDICTS = 0.01
"""Least R^2 at which a linear map predicts anything."""
_AGREES = 0.8
"""Share of the most frequent tenth with partners below which two dictionaries disagree."""
_CAPPED = 0.05
_SAME = 0.5
"""Correlation of error lengths above which two dictionaries fail on the same rows."""

WRONG_RECAPTURE = (
    "Capture-recapture (Lincoln-Petersen) gives a wrong number of features and must not be used: "
    "it assumes that two dictionaries are independent draws, but both find the frequent features "
    "first, so what they share does not show what both miss."
)


def findings(
    studies: Sequence[Study], overlaps: Mapping[tuple[str, str], Overlap] | None = None
) -> Findings:
    """Report the dark matter of some dictionaries.

    Args:
        studies: Studies of the runs.
        overlaps: Latents that two runs share, by the names of the two.
    """
    overlaps = overlaps or {}
    checks = list(_checks(studies))
    failures = list(_same_failures(studies))
    numbers = {
        "runs": {study.name: _numbers(study) for study in studies},
        "checks": [
            {
                "from": [study.name for study in check.narrower],
                "to": check.wider.name,
                "predicted": check.predicted.numbers(),
                "measured": check.measured.numbers(),
                "verdict": check.verdict,
            }
            for check in checks
        ],
        "error_norm_correlations": [
            {"runs": list(names), "correlation": value} for names, value in failures
        ],
        "overlaps": [
            {"runs": list(names), "share": each.share, **each._asdict()}
            | {"recapture": _finite(each.recapture)}
            for names, each in overlaps.items()
        ],
    }
    summary = [line for study in studies for line in _sentences(study)]
    summary += [line for check in checks for line in _check_sentences(check)]
    summary += [
        f"{one} and {other}: the lengths of their errors on the same rows have a correlation of "
        f"{value:.2f}: {'the wider one fails on the same rows' if value > _SAME else 'weak'}."
        for (one, other), value in failures
    ]
    for names, each in overlaps.items():
        summary += _overlap_sentences(names, each)
    caveats = [line for study in studies for line in _caveats(study)]
    if len(studies) > 1 and len({study.plan for study in studies}) > 1:
        caveats.append("The runs use different activation sets; only runs of one set are compared.")
    return Findings(
        numbers,
        summary,
        caveats,
        {"ranks": rank_table(studies), "overlap": overlap_table(overlaps)},
        [figure for figure in figures(studies, checks, overlaps) if figure],
    )


def is_at_chance(study: Study) -> bool:
    """Return whether the decoder explains no more than directions unrelated to the rows do."""
    return study.tail is not None and study.tail.explained - study.tail.chance < _EXPLAINS


def _checks(studies: Sequence[Study]) -> Iterator[Check]:
    """Yield predictions for each dictionary, from one or two narrower ones on the same rows."""
    ordered = sorted((s for s in studies if s.tail and not is_at_chance(s)), key=_alive)
    for place, one in enumerate(ordered):
        for other in ordered[place + 1 :]:
            law = one.energy_law
            if law and one.tail and other.tail and _is_wider(other, one):
                predicted = floor(one.tail.residual, one.tail.unique, law, one.alive, other.alive)
                yield Check((one,), other, predicted, other.tail.residual)
    for one, two, other in combinations(ordered, 3):
        law = two.energy_law
        if law and one.tail and two.tail and other.tail and _is_wider(two, one):
            if not _is_wider(other, two):
                continue
            alive = (one.alive, two.alive, other.alive)
            predicted = forecast((one.tail.residual, two.tail.residual), law, alive)
            yield Check((one, two), other, predicted, other.tail.residual)


def _alive(study: Study) -> int:
    return study.alive


def _is_wider(other: Study, one: Study) -> bool:
    return other.plan == one.plan and other.alive > _WIDER_BY * one.alive


def _same_failures(studies: Sequence[Study]) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield correlations between the error lengths of each dictionary and the next wider one."""
    ordered = sorted(studies, key=_alive)
    for one, other in pairwise(ordered):
        if one.plan == other.plan and one.judged_rows == other.judged_rows > 1:
            both = torch.corrcoef(torch.stack([one.parts.norms, other.parts.norms]))
            if math.isfinite(value := float(both[0, 1])):
                yield (one.name, other.name), value


def _numbers(study: Study) -> dict[str, Any]:
    found: dict[str, Any] = {
        "n_latents": study.n_latents,
        "alive": study.alive,
        "l0": study.l0,
        "indexed_rows": study.indexed_rows,
        "fit_rows": study.linear.rows,
        "judged_rows": study.judged_rows,
        "judged_documents": study.judged_documents,
        "penalties": list(study.linear.penalties),
        **study.parts.numbers,
        "intervals": study.parts.intervals,
    }
    for part in ("whole", "nonlinear", "linear"):
        if part in study.losses:
            found[f"ce_rise_{part}"] = study.losses[part]
    if "tokens" in study.losses:
        found["ce_tokens"] = study.losses["tokens"]
    if (tail := study.tail) is None:
        return found
    found |= {
        "tail": tail.residual.numbers(),
        "interference": tail.interference,
        "unique_energy": tail.unique.numbers(),
        "pursued_rows": tail.rows,
        "pursued_fvu": tail.fvu,
        "pursued_l0": tail.latents,
        "pursued_capped": tail.capped,
        "explained": tail.explained,
        "explained_by_chance": tail.chance,
        "nothing": is_at_chance(study),
    }
    law, frequencies = study.energy_law, study.frequency_law
    if law and frequencies and not is_at_chance(study):
        found |= {
            "frequency_exponent": frequencies.exponent.numbers(),
            "energy_exponent": law.exponent.numbers(),
            "floors": {
                str(times): span.numbers() for times in _WIDER if (span := _floor(study, times))
            },
        }
        if _has_distinct_latents(study):
            end = law.rank_of(study.alive, tail.residual)
            found["tail_ends_at_rank"] = list(map(_finite, end))
    return found


def _sentences(study: Study) -> Iterator[str]:
    parts, tail = study.parts.numbers, study.tail
    name = f"{study.name} ({study.alive:,} of {study.n_latents:,} latents alive)"
    if tail is None:
        yield f"{name}: FVU {parts['fvu']:.3f} on {study.judged_rows:,} held-out rows."
    elif is_at_chance(study):
        yield (
            f"{name}: nothing found. The decoder explains {_percent(tail.explained)} of the rows, "
            f"and {_percent(tail.chance)} after a random rotation of them, so it has found no "
            f"features and there is no tail to measure."
        )
    else:
        rest = (
            f"{tail.interference:.3f} is interference, from errors of the encoder and the limit on "
            f"active latents"
            if tail.interference > 0
            else "no interference can be distinguished from it"
        )
        yield (
            f"{name}: FVU {tail.fvu:.3f}. The tail, which the decoder cannot describe, is "
            f"{_shown(tail.residual)}; {rest}. FVU alone is not the tail."
        )
        yield from _law_sentences(study)
    if parts["error_r2"] < _PREDICTS and parts["norm_r2"] < _PREDICTS:
        yield f"{study.name}: no part of the error is linear in the inputs."
    else:
        yield (
            f"{study.name}: a linear map of the inputs predicts {_percent(parts['error_r2'])} of "
            f"the error and {_percent(parts['norm_r2'])} of the variance of its squared length; "
            f"FVU_nonlinear is {parts['fvu_nonlinear']:.3f}."
        )
    if rises := study.losses:
        yield (
            f"{study.name}: the cross-entropy rises by {rises['whole']:.3f} nats with the whole "
            f"error, by {rises['nonlinear']:.3f} with the nonlinear part alone and by "
            f"{rises['linear']:.3f} with the linear part alone."
        )


def _law_sentences(study: Study) -> Iterator[str]:
    law, frequencies, tail = study.energy_law, study.frequency_law, study.tail
    if not law or not frequencies or not tail:
        yield f"{study.name}: no law is fitted to fewer than {LEAST_ALIVE} alive latents."
        return
    floors = ", ".join(
        f"{_shown(span)} with {times} times as many"
        for times in _WIDER
        if (span := _floor(study, times))
    )
    yield (
        f"{study.name}: firing frequencies fall as rank^-{_shown(frequencies.exponent, 2)}, "
        f"energies as rank^-{_shown(law.exponent, 2)}. Of the energy of the weaker half of "
        f"the latents, {_percent(tail.unique.value)} is unique: the other half cannot describe it. "
        f"If this continues, the tail of a dictionary with more alive latents (the floor of its "
        f"FVU) is at least {floors}."
    )
    if not _has_distinct_latents(study):
        yield (
            f"{study.name}: its weaker latents partly duplicate others, so their energies do not "
            f"show how many features are missing, and the floor is a weak bound."
        )
        return
    end = law.rank_of(study.alive, tail.residual)
    yield (
        f"{study.name}: if the law continued, the tail would end at rank {short_number(end.value)} "
        f"({short_number(end.low)} to {short_number(end.high)}); this is an extrapolation, "
        f"not a count of features."
    )


def _has_distinct_latents(study: Study) -> bool:
    """Return whether latents stand for distinct features, so that a law can estimate how many."""
    return study.tail is not None and study.tail.unique.value > _UNIQUE


def _floor(study: Study, times: int) -> Span | None:
    """Return the floor of the tail with `times` as many alive latents; None without a law."""
    law, tail = study.energy_law, study.tail
    if not law or not tail:
        return None
    return floor(tail.residual, tail.unique, law, study.alive, times * study.alive)


def _check_sentences(check: Check) -> Iterator[str]:
    names = " and ".join(study.name for study in check.narrower)
    what = "floor" if len(check.narrower) == 1 else "forecast"
    meaning = {
        "within": "the intervals overlap",
        "above": "it gained less: its latents split what others had, or it saw too few rows",
        "below": "it gained more, so the law does not hold here",
    }[check.verdict]
    yield (
        f"Held out: {names} give{'s' if what == 'floor' else ''} a {what} of "
        f"{_shown(check.predicted)} for the tail of {check.wider.name}; measured: "
        f"{_shown(check.measured)}, {check.verdict}: {meaning}."
    )


def _overlap_sentences(names: tuple[str, str], each: Overlap) -> Iterator[str]:
    one, other = names
    if not each.partners:
        yield f"{one} and {other}: nothing in common; no latent has a partner."
        return
    rare, frequent = each.shares[0], each.shares[-1]
    yield (
        f"{one} and {other}: {_percent(each.share)} of {each.looked_at:,} alive latents of the "
        f"first have a partner in the second; of the most frequent tenth {_percent(frequent)}, of "
        f"the rarest {_percent(rare)}."
    )
    if frequent < _AGREES:
        yield (
            "ALARM: frequent latents disagree, although both dictionaries had enough rows to "
            "learn the same features. They are not determined by the data; do not read single "
            "latents as features of the model."
        )
    else:
        yield (
            "Frequent latents agree. Disagreement among rare latents is expected: of the features "
            "that are almost too rare, each dictionary learns different ones."
        )
    yield f"{WRONG_RECAPTURE} It would give {short_number(each.recapture)} here."


def _caveats(study: Study) -> Iterator[str]:
    for line in study.left_out:
        yield f"{study.name}: {line}."
    enough = ENOUGH_ROWS * len(study.linear.weights)
    if study.linear.rows < enough:
        yield (
            f"{study.name}: the linear maps are fitted to only {study.linear.rows:,} rows, with "
            f"a penalty, so their R^2 may be too low; {enough:,} rows would need no penalty."
        )
    if not study.parts.intervals:
        yield f"{study.name}: the judged rows come from one document, so there are no intervals."
    if study.tail and study.tail.capped > _CAPPED:
        yield (
            f"{study.name}: {_percent(study.tail.capped)} of the rows use as many latents as the "
            f"solver may, so their tail is too large, or they contain what latents cannot describe."
        )
    if study.tail and study.tail.interference < 0 and not is_at_chance(study):
        yield (
            f"{study.name}: the encoder's error is below the solver's, so its latents also "
            f"describe what chance would explain; the tail is at most the FVU."
        )


def _shown(span: Span, digits: int = 3) -> str:
    return f"{span.value:.{digits}f} ({span.low:.{digits}f} to {span.high:.{digits}f})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
