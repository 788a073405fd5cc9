"""`dist-sae analyse coverage`: which concepts have a latent, by frequency and dictionary width."""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dist_sae.commands import shared
from dist_sae.commands.analyse import common
from dist_sae.errors import ArgumentError, ConfigError

if TYPE_CHECKING:
    from dist_sae.analysis.coverage import Covered
    from dist_sae.config import Run
    from dist_sae.report.outcome import Findings

_CORPUS_WORDS = 400
_ROTATED_COPY = "its randomly rotated copy"


def add(analyses: shared.Commands) -> None:
    """Add the analysis."""
    text = "which concepts have their own latent, by frequency, and how wide a dictionary must be"
    parser = common.add_analysis(analyses, "coverage", main, text, several=True)
    parser.add_argument(
        "--concepts",
        metavar="LIST",
        nargs="+",
        default=["elements", "cities", "animals", "foods"],
        help="elements, cities, animals, foods; corpus, for 400 words of the corpus itself, from "
        "frequent to rare; or files with one word per line, optionally followed by a tab and its "
        "count (default: the first four)",
    )
    parser.add_argument(
        "--truth",
        action="store_true",
        help="the concepts are the features of the synthetic world, matched by direction",
    )
    parser.add_argument(
        "--f1",
        metavar="F1",
        type=float,
        default=0.8,
        help="least F1 of a word's latent on held-out documents (default: 0.8)",
    )
    parser.add_argument(
        "--frequency",
        metavar="P",
        type=float,
        action="append",
        default=[],
        help="forecast how many latents and rows are needed for concepts of this frequency per row",
    )
    parser.add_argument(
        "--control",
        metavar="RUN",
        help="also compare with the words of this run, for example of an untrained model",
    )
    parser.add_argument(
        "--no-chance",
        dest="chance",
        action="store_false",
        help="skip the comparison with a randomly rotated copy, which encodes rows again",
    )


def main(options: argparse.Namespace) -> None:
    """Find the concepts that have a latent."""
    name, runs = shared.load_several(options)
    if not 0.3 < options.f1 <= 1:  # noqa: PLR2004 - pairs below are not followed
        raise ArgumentError(f"--f1 {options.f1:g}: must be above 0.3 and at most 1")
    if wrong := [p for p in options.frequency if not 0 < p < 1]:
        raise ArgumentError(f"--frequency {wrong[0]:g}: must be between 0 and 1")
    if options.frequency:
        from dist_sae.analysis.coverage import check_widths

        check_widths([run.name for run in runs])
    if options.truth and options.control:
        raise ArgumentError(
            "--truth: cannot be used with --control; features are matched by direction"
        )
    settings = {
        "concepts": "truth" if options.truth else options.concepts,
        "f1": options.f1,
        "chance": options.chance,
        "control": options.control,
    }
    title = "Coverage: which concepts have a latent"
    common.run_analysis(options, name, runs, title, settings, lambda: _find(options, runs))


def _find(options: argparse.Namespace, runs: "Sequence[Run]") -> "Findings":
    from dist_sae.analysis.coverage import coverage

    covered = _features(runs) if options.truth else list(_words(options, runs))
    return coverage(covered, options.frequency)


def _words(options: argparse.Namespace, runs: "Sequence[Run]") -> "Iterator[Covered]":
    from dist_sae.analysis.chance import compare_words, match_rotated
    from dist_sae.analysis.coverage import cover_words, frequencies, judged_words
    from dist_sae.analysis.indexed_run import IndexedRun, open_indexed_run
    from dist_sae.analysis.matching import LEAST_OCCURRENCES, Matched, match_words
    from dist_sae.analysis.words import CORPUS, WordRows, corpus_words, find_words, read_lists

    concepts = read_lists(name for name in options.concepts if name != CORPUS)
    indexed_runs = [open_indexed_run(run) for run in runs]
    control = None
    if options.control is not None:
        from dist_sae.checkpoint.run_folder import open_run

        control = open_indexed_run(open_run(options.control))
    for indexed in [*indexed_runs, *([control] if control else [])]:
        indexed.index.check_postings()
    if CORPUS in options.concepts:
        tokenizer, words = indexed_runs[0].tokenizer(), {concept.word for concept in concepts}
        least = 4 * LEAST_OCCURRENCES  # so that few words are too rare in one of the halves
        chosen = corpus_words(indexed_runs[0].index, tokenizer, _CORPUS_WORDS, least)
        concepts += [concept for concept in chosen if concept.word not in words]
    known: dict[tuple[str, tuple[int, ...], float], WordRows] = {}

    def match(indexed: IndexedRun) -> tuple[WordRows, Matched]:
        manifest = indexed.index.manifest
        rows = manifest.plan, manifest.units, manifest.postings_share
        if rows not in known:  # the jobs of a sweep share their rows
            known[rows] = find_words(indexed.index, indexed.tokenizer(), concepts)
        return known[rows], match_words(indexed.index, known[rows], len(concepts))

    controls = match(control)[1] if control else None
    for indexed in indexed_runs:
        index, (words_at, matched) = indexed.index, match(indexed)
        frequency = frequencies(concepts, words_at, index.manifest.postings_share)
        judged_words(frequency, matched)  # before the slow part: raises if too few
        name, trained = indexed.run.name, indexed.trained_rows
        comparisons, caveat = [], f"{name}: not compared with chance (--no-chance)"
        if options.chance:
            try:
                n_rows, own, rotated = match_rotated(indexed, words_at, len(concepts), matched)
            except ConfigError as exc:  # rows that were deleted after use
                caveat = str(exc)
            else:
                caveat = ""
                found = [each.recovered(options.f1) for each in (own, rotated)]
                comparisons.append(compare_words(_ROTATED_COPY, n_rows, own.judged, *found))
        if control and controls:
            found = [each.recovered(options.f1) for each in (matched, controls)]
            judged, n_rows = matched.judged & controls.judged, int(words_at.starts[-1])
            comparisons.append(compare_words(control.run.name, n_rows, judged, *found))
        found_of = concepts, frequency, matched, options.f1, comparisons, caveat
        yield cover_words(name, index.firings, trained, *found_of)


def _features(runs: "Sequence[Run]") -> "list[Covered]":
    from dist_sae.analysis.coverage import cover_features
    from dist_sae.analysis.indexed_run import open_indexed_run
    from dist_sae.analysis.truth import match_features
    from dist_sae.config.data import SyntheticModel
    from dist_sae.index.decoder import Decoder
    from dist_sae.models.synthetic import SyntheticSource

    covered = []
    for run in runs:
        if not isinstance(run.model, SyntheticModel):
            raise ArgumentError(
                f"--truth: {run.name} uses a language model, whose features are unknown"
            )
        if not run.sae.has_latent_rows:
            raise ArgumentError(f"--truth: {run.name} has no decoder row for each latent")
    if len({run.model.model_dump_json() for run in runs}) > 1:
        raise ArgumentError("--truth: the runs use several worlds; name runs of one world")
    for indexed in map(open_indexed_run, runs):
        assert isinstance(indexed.run.model, SyntheticModel)
        world = SyntheticSource(indexed.run.model)
        parts = Decoder(indexed.checkpoint).directions()
        latent_of = match_features(world.directions, parts)
        p = world.probabilities.double().numpy()
        name, trained = indexed.run.name, indexed.trained_rows
        covered.append(cover_features(name, indexed.index.firings, trained, p, latent_of))
    return covered
